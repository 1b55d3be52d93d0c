"""Newcomers that chose at the same moment make way for each other, each by what it sees alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from petalsd.swarm.directory import SwarmView
from petalsd.swarm.placement.claims import newcomers, review
from petalsd.swarm.placement.joining import choose_span
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.reading import read_state
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan

POLICY = Policy()
ONLINE, JOINING = ServerState.ONLINE, ServerState.JOINING


class Directory:
    """Peers with one record each."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.records: dict[str, ServerRecord] = {}

    def put(
        self, peer: str, state: ServerState, span: BlockSpan, rate: float = 1.0, version: str = "petalsd 1"
    ) -> None:
        self.records[peer] = ServerRecord(state, rate, span=span, version=version)

    def view(self) -> SwarmView:
        blocks: list[dict[str, ServerRecord]] = [{} for _ in range(self.num_blocks)]
        for peer, record in self.records.items():
            for block in record.span or ():
                blocks[block][peer] = record
        return SwarmView("prefix", self.num_blocks, blocks)

    def review(self, peer: str) -> tuple[BlockSpan, bool]:
        """Where ``peer`` should be, and whether that is settled."""
        view = self.view()
        found = review(read_state(view), newcomers(view), peer, POLICY)
        return found.target, found.is_undisputed

    def weakest(self) -> float:
        return float(read_state(self.view()).planned_cover().min())


def test_the_highest_peer_ids_make_way() -> None:
    """Six at the first of three places: two stay, each of the others goes where two are."""
    directory = Directory(6)
    for peer in "abcdef":
        directory.put(peer, JOINING, BlockSpan(0, 2))
    targets = {peer: directory.review(peer) for peer in "abcdef"}
    assert [str(targets[peer][0]) for peer in "abcdef"] == ["0:2", "0:2", "4:6", "2:4", "4:6", "2:4"]
    assert not any(is_settled for _, is_settled in targets.values())
    for peer, (target, _) in targets.items():
        directory.put(peer, JOINING, target)
    assert all(directory.review(peer)[1] for peer in "abcdef")


def test_who_has_found_its_place_is_left_there() -> None:
    """A newcomer that came before with a higher PeerID, and one that only pays a little where it is."""
    directory = Directory(4)
    directory.put("b", JOINING, BlockSpan(0, 2))
    directory.put("a", JOINING, BlockSpan(2, 4), 1.001)
    assert directory.review("a") == (BlockSpan(2, 4), True)
    assert directory.review("b") == (BlockSpan(0, 2), True)


@pytest.mark.parametrize(("state", "version"), [(ONLINE, "petalsd 1"), (JOINING, "2.2.0"), (ONLINE, "2.2.0")])
def test_only_newcomers_that_follow_the_rule_are_expected_to_make_way(
    state: ServerState, version: str
) -> None:
    """The others stay, whatever their PeerID, so we go."""
    directory = Directory(4)
    directory.put("a", JOINING, BlockSpan(0, 2))
    directory.put("z", state, BlockSpan(0, 2), version=version)
    assert directory.review("a") == (BlockSpan(2, 4), False)


def test_a_server_that_keeps_blocks_while_it_moves_is_no_newcomer() -> None:
    view = Directory(4).view()
    part = ServerRecord(ONLINE, 1.0, span=BlockSpan(0, 1), version="petalsd 1")
    view.blocks[0]["m"] = part  # type: ignore[index]
    view.blocks[1]["m"] = replace(part, state=JOINING, span=BlockSpan(1, 2))  # type: ignore[index]
    assert newcomers(view) == frozenset()


@pytest.mark.parametrize("seed", range(12))
def test_a_wave_spreads_as_if_they_had_come_one_by_one(seed: int) -> None:
    """All choose in the same swarm, then act on the same views: after three looks the weakest block is as good."""
    rng = random.Random(seed)
    directory, one_by_one = Directory(24), Directory(24)
    for number in range(rng.randrange(4)):
        start = rng.randrange(20)
        for one in (directory, one_by_one):
            one.put(f"online{number}", ONLINE, BlockSpan(start, start + 4), rng.uniform(5, 20))
    wave = {f"p{number:02d}": (rng.randrange(2, 12), rng.lognormvariate(2, 0.5)) for number in range(30)}
    before = read_state(directory.view())
    for peer, (length, rate) in wave.items():
        directory.put(peer, JOINING, choose_span(before, length, rate, POLICY), rate)
        state = read_state(one_by_one.view())
        one_by_one.put(peer, ONLINE, choose_span(state, length, rate, POLICY), rate)
    assert directory.weakest() < 0.5 * one_by_one.weakest()
    for _ in range(3):
        targets = {peer: directory.review(peer)[0] for peer in wave}
        for peer, (_, rate) in wave.items():
            directory.put(peer, JOINING, targets[peer], rate)
    assert directory.weakest() >= 0.9 * one_by_one.weakest()
