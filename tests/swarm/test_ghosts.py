"""Servers that went without a goodbye: when their records stop counting, and when they count again."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from petalsd.swarm.directory import SwarmView, read_view
from petalsd.swarm.ghosts import APART_S, ASK_AGAIN_S, MAX_PINGS, GhostFinder, GhostRule, silence_reports
from petalsd.swarm.protocol import ServerState, make_uid
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan
from tests.swarm.servers import joining, node

SILENT = math.inf
SOON = 100.0  # when the first records expire
NOBODY_SAYS: dict[str, int] = {}


def rule(*rtts: float, apart_s: float = APART_S, expiration: float = SOON) -> GhostRule:
    """What is thought of the server "a" after these pings."""
    made = GhostRule()
    for number, rtt_s in enumerate(rtts):
        made.pinged("a", rtt_s, expiration, number * apart_s)
    return made


@pytest.mark.parametrize(
    ("rtts", "apart_s", "more_say_so", "is_ghost"),
    [
        ((0.1, SILENT), APART_S, 0, False),
        ((0.1, SILENT, SILENT), APART_S, 0, True),
        ((0.1, SILENT, SILENT), APART_S, -3, True),  # what others remember may be from before
        ((0.1, SILENT, SILENT, SILENT), APART_S / 4, 0, False),
        ((0.1, SILENT, SILENT, 0.1), APART_S, 2, False),
        ((SILENT, SILENT), APART_S, 0, False),
        ((SILENT, SILENT), APART_S, 1, True),
        ((SILENT, SILENT), APART_S, -1, False),
    ],
)
def test_two_silences_and_a_witness(
    rtts: tuple[float, ...], apart_s: float, more_say_so: int, is_ghost: bool
) -> None:
    """One lost packet, or several at once, prove nothing; who never answered us needs others to say the same."""
    ghosts = rule(*rtts, apart_s=apart_s).ghosts({"a": more_say_so})
    assert ghosts == (frozenset({"a"}) if is_ghost else frozenset())


def test_who_renews_its_record_lives_out_of_our_reach() -> None:
    """A renewal after the first silence ends the suspicion until the server has answered again."""
    judged = rule(0.1, SILENT, SILENT)
    judged.read({"a": SOON})
    assert judged.ghosts(NOBODY_SAYS) == {"a"}
    judged.read({"a": SOON + 60})
    judged.pinged("a", SILENT, SOON + 60, 50.0)
    judged.pinged("a", SILENT, SOON + 60, 60.0)
    assert judged.ghosts({"a": 5}) == frozenset() and judged.suspects() == []
    judged.pinged("a", 0.1, SOON + 60, 70.0)
    judged.pinged("a", SILENT, SOON + 60, 80.0)
    judged.pinged("a", SILENT, SOON + 60, 90.0)
    assert judged.ghosts(NOBODY_SAYS) == {"a"}
    judged.read({})
    assert judged.ghosts(NOBODY_SAYS) == frozenset()


def record(
    next_pings: dict[str, float] | None = None, state: ServerState = ServerState.ONLINE
) -> ServerRecord:
    return ServerRecord(state, 1.0, BlockSpan(0, 1), next_pings=next_pings, expiration=SOON)


def direct(next_pings: dict[str, float] | None = None) -> ServerRecord:
    """Of a server that others reach without a relay."""
    return replace(record(next_pings), using_relay=False)


def test_reports_are_counted_by_server() -> None:
    """Each witness counts once for each server that it pinged."""
    servers = {"x": record({"a": SILENT, "b": 0.1}), "y": record({"a": SILENT, "b": SILENT}), "z": record()}
    assert silence_reports(servers) == {"a": 2, "b": 0}


class Network:
    """``silent`` peers do not answer; a clock that every ping moves on."""

    def __init__(self, *silent: str, is_in_touch: bool = True) -> None:
        self.silent = set(silent)
        self.asked: list[str] = []
        self.votes: dict[str, int] = {}
        self.questions: list[tuple[list[str], list[str]]] = []
        self.now = 0.0
        self._is_in_touch = is_in_touch
        self.finder = GhostFinder(
            self._ping, "own", self._answer_touch, lambda: self.now, testify=self._testify
        )

    async def _ping(self, peer: str) -> float:
        self.now += APART_S
        self.asked.append(peer)
        return SILENT if peer in self.silent else 0.1

    async def _answer_touch(self) -> bool:
        return self._is_in_touch

    async def _testify(self, suspects: Sequence[str], living: Sequence[str]) -> dict[str, int]:
        self.questions.append((sorted(suspects), sorted(living)))
        return self.votes

    async def search(self, records: dict[str, ServerRecord]) -> frozenset[str]:
        self.asked.clear()
        return await self.finder.search(SwarmView("m", 1, [records]), pause_s=0.0)


async def test_a_search_asks_the_silent_once_more() -> None:
    """Who answered before and is silent twice is found in one search; then it is asked once each time."""
    network, records = Network(), {name: record() for name in ("own", "a", "b")}
    assert await network.search(records) == frozenset()
    assert sorted(network.asked) == ["a", "b"]
    network.silent = {"b"}
    assert await network.search(records) == {"b"} == network.finder.known
    assert sorted(network.asked) == ["a", "b", "b"]
    assert await network.search(records) == {"b"} and sorted(network.asked) == ["a", "b"]
    network.silent = set()
    assert await network.search(records) == frozenset()


async def test_the_log_tells_who_answers_again_from_whose_record_ended() -> None:
    """A server that stays away is not back: its record expired, which is where most ghosts end."""
    network, records = Network(), {name: record() for name in ("a", "b", "c")}
    await network.search(records)
    network.silent = {"b", "c"}
    with capture_logs() as logs:
        await network.search(records)
        network.silent = {"c"}
        del records["c"]
        await network.search(records)
    assert [(entry["gone"], entry["back"], entry["expired"]) for entry in logs] == [
        (["b", "c"], [], []),
        ([], ["b"], ["c"]),
    ]


async def test_a_large_swarm_is_asked_where_somebody_is_in_doubt() -> None:
    """Those that others miss come first; OFFLINE servers are nobody's ghosts."""
    network = Network("lost", "gone")
    records = {f"s{number}": record({"lost": SILENT}) for number in range(200)}
    records |= {"lost": record(), "gone": record(state=ServerState.OFFLINE)}
    assert await network.search(records) == {"lost"}
    assert len(network.asked) == MAX_PINGS + 1 and network.asked[0] == "lost" == network.asked[-1]


async def test_when_nobody_answers_the_silence_is_ours() -> None:
    """Without a network of our own nobody becomes a ghost."""
    network, records = Network(is_in_touch=False), {"a": record(), "b": record()}
    await network.search(records)
    network.silent = {"a", "b"}
    assert await network.search(records) == frozenset()


async def test_others_are_asked_about_who_never_answered_us() -> None:
    """What they found out just now counts more than what servers have announced; it is asked once a minute."""
    network = Network("gone", "relayed", "lost")
    records = {
        "a": direct({"gone": 0.1}),
        "b": direct(),
        "gone": direct(),
        "lost": direct(),
        "relayed": record(),
    }
    network.votes = {"gone": 1, "lost": -1}
    assert await network.search(records) == {"gone"}
    assert network.questions == [(["gone", "lost"], ["a", "b"])]
    assert await network.search(records) == {"gone"} and len(network.questions) == 1
    network.now += ASK_AGAIN_S
    network.votes = {"lost": 3}
    assert await network.search(records) == {"gone", "lost"}
    assert network.questions[1:] == [(["lost"], ["a", "b"])]
    records["gone"] = replace(direct(), expiration=SOON + 60)
    network.silent = {"gone"}
    assert await network.search(records) == frozenset()


async def test_nobody_is_asked_about_who_answered_us_once() -> None:
    """Nor about those of whom others say already that they are gone."""
    network, records = Network(), {"a": direct(), "b": direct(), "c": direct({"d": SILENT}), "d": direct()}
    network.silent = {"d"}
    assert await network.search(records) == {"d"}
    network.silent = {"b", "d"}
    assert await network.search(records) == {"b", "d"} and not network.questions


def test_a_view_without_ghosts() -> None:
    """What ghosts claim to serve is missing."""
    view = SwarmView("m", 2, [{"a": record()}, {"b": replace(record(), span=None)}], frozenset({"b"}))
    assert view.missing_blocks() == [] and view.without_ghosts().missing_blocks() == [1]


@pytest.mark.swarm
async def test_a_crashed_server_of_a_real_swarm_is_found() -> None:
    """Its record lives for another minute, and counts no more once its node is gone."""
    async with node() as first, node(await joining(first)) as second:
        finder = GhostFinder(second.ping, second.peer_id, second.is_in_touch)
        async with node(await joining(first)) as third:
            for peer in (first, third):
                wire = ServerRecord(ServerState.ONLINE, 1.0, BlockSpan(0, 1)).to_wire()
                await peer.store([make_uid("m", 0)], peer.peer_id, wire, time.time() + 60, 10)
            assert await finder.search(await read_view(second, "m", 1)) == frozenset()
            crashed = third.peer_id
        view = await read_view(second, "m", 1)
        assert crashed in view.blocks[0]
        assert await finder.search(view) == {crashed}
