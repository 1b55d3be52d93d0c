"""The sequence manager: what it routes by, and when it reads the directory again."""

from __future__ import annotations

import asyncio
import math
import random

import pytest

from petalsd.client.options import ClientOptions
from petalsd.client.sequence import SequenceManager
from petalsd.errors import DeadlineExceeded, MissingBlocks
from petalsd.swarm.directory import RemoteSpan, SwarmView
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan
from tests.client.fake_swarm import make_span

BLOCKS = BlockSpan(0, 6)


def make_view(*spans: RemoteSpan) -> SwarmView:
    blocks = [{span.peer: span.record for span in spans if block in span.span} for block in BLOCKS]
    return SwarmView("tiny", len(BLOCKS), blocks)


class FakeDirectory:
    """A directory that can be changed, fail, and tell how often it was read."""

    def __init__(self, *spans: RemoteSpan) -> None:
        self.view = make_view(*spans)
        self.reads = 0
        self.was_read = asyncio.Event()
        self.error: Exception | None = None
        self.pings: dict[str, float] = {}
        self.pinged: list[str] = []

    async def read(self) -> SwarmView:
        self.reads += 1
        self.was_read.set()
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return self.view

    async def ping(self, peer: str) -> float:
        self.pinged.append(peer)
        return self.pings.get(peer, 0.01)

    def manager(self, **options: object) -> SequenceManager:
        settings = ClientOptions(**options)  # type: ignore[arg-type]
        return SequenceManager(self.read, self.ping, "tiny", len(BLOCKS), settings, random.Random(0))


async def test_a_failed_server_is_avoided_from_the_next_route_on() -> None:
    """No reading of the directory is needed for a ban to count, and success ends it."""
    directory = FakeDirectory(make_span("a", 0, 6, inference_rps=900.0), make_span("b", 0, 6))
    manager = directory.manager()
    await manager.refresh()
    assert [hop.peer for hop in manager.route_session(BLOCKS, 10)] == ["a"]
    manager.report_failure("a")
    assert [hop.peer for hop in manager.route_session(BLOCKS, 10)] == ["b"]
    assert {manager.route_pass(BLOCKS)[0].peer for _ in range(50)} == {"b"}
    manager.report_success("a")
    assert [hop.peer for hop in manager.route_session(BLOCKS, 10)] == ["a"]


async def test_only_online_and_allowed_servers_are_used() -> None:
    """JOINING ones do not compute; the user's lists are respected."""
    joining = make_span("j", 0, 6)
    joining = RemoteSpan("j", joining.span, type(joining.record)(ServerState.JOINING, 1.0, span=joining.span))
    directory = FakeDirectory(joining, make_span("a", 0, 6), make_span("b", 0, 6), make_span("c", 0, 6))
    manager = directory.manager(allowed_servers=frozenset({"a", "b", "j"}), blocked_servers=frozenset({"b"}))
    await manager.refresh()
    assert [span.peer for span in manager.spans] == ["a"]


async def test_only_servers_with_the_adapter_are_used() -> None:
    """And the adapter is named where some blocks have none."""
    with_it = {"adapters": ("poet", "cook")}
    directory = FakeDirectory(make_span("a", 0, 6), make_span("b", 0, 6, **with_it))
    manager = directory.manager(adapter="poet")
    await manager.refresh()
    assert [hop.peer for hop in manager.route_session(BLOCKS, 10)] == ["b"]
    directory.view = make_view(make_span("a", 0, 6), make_span("b", 0, 4, **with_it))
    await manager.refresh()
    for route in (lambda: manager.route_session(BLOCKS, 10), lambda: manager.route_pass(BLOCKS)):
        with pytest.raises(MissingBlocks, match="no server holds blocks 4:6 of tiny with adapter poet"):
            route()


async def test_callers_at_the_same_time_share_one_reading() -> None:
    """Many sessions that lose a server do not flood the DHT."""
    directory = FakeDirectory(make_span("a", 0, 6))
    manager = directory.manager()
    await asyncio.gather(*(manager.refresh() for _ in range(5)))
    assert directory.reads == 1


async def test_a_failed_reading_keeps_the_old_view() -> None:
    """A DHT that does not answer is no reason to forget everybody."""
    directory = FakeDirectory(make_span("a", 0, 6))
    manager = directory.manager()
    await manager.refresh()
    directory.error = DeadlineExceeded("reading in the DHT took longer than 30 s")
    await manager.refresh()
    assert [hop.peer for hop in manager.route_session(BLOCKS, 10)] == ["a"]


async def test_a_failure_wakes_the_reader() -> None:
    """The directory is read again at once, not after the period."""
    directory = FakeDirectory(make_span("a", 0, 6))
    manager = directory.manager(refresh_period_s=3600.0)
    await manager.start()
    directory.was_read.clear()
    manager.report_failure("a")
    await asyncio.wait_for(directory.was_read.wait(), 10)
    await manager.stop()
    assert directory.reads == 2


async def test_the_directory_is_read_periodically() -> None:
    """New servers are found without a failure."""
    directory = FakeDirectory()
    manager = directory.manager(refresh_period_s=0.01)
    await manager.start()
    with pytest.raises(MissingBlocks):
        manager.route_session(BLOCKS, 10)
    directory.view = make_view(make_span("a", 0, 6))
    for _ in range(2):
        directory.was_read.clear()
        await asyncio.wait_for(directory.was_read.wait(), 10)
    await manager.stop()
    assert [hop.peer for hop in manager.route_session(BLOCKS, 10)] == ["a"]


async def test_pings_of_first_and_last_servers_steer_the_route() -> None:
    """Also servers that hold the first block only are measured."""
    directory = FakeDirectory(make_span("a", 0, 1), make_span("b", 0, 1), make_span("c", 1, 6))
    directory.pings = {"a": 2.0}
    manager = directory.manager()
    await manager.refresh()
    assert set(directory.pinged) == {"a", "b", "c"}
    assert [hop.peer for hop in manager.route_session(BLOCKS, 10)] == ["b", "c"]


async def test_a_ping_that_never_ends_counts_as_no_answer() -> None:
    """The reading goes on after the ping's deadline."""
    directory = FakeDirectory(make_span("a", 0, 6), make_span("b", 0, 6, inference_rps=10.0))

    async def hang(peer: str) -> float:
        if peer == "a":
            await asyncio.Event().wait()
        return 0.01

    directory.ping = hang  # type: ignore[method-assign]
    manager = directory.manager(ping_timeout_s=0.01)
    await manager.refresh()
    assert [hop.peer for hop in manager.route_session(BLOCKS, 10)] == ["b"]
    assert math.inf in manager._rtt_s.values()
