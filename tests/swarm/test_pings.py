"""Round trips: smoothed, forgotten, sampled."""

from __future__ import annotations

import math
import random

import pytest

from petalsd.swarm.pings import PingTracker, choose_targets
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan

RECORD = ServerRecord(ServerState.ONLINE, 1.0)


class Network:
    """Scripted round trips and a clock that is set by hand."""

    def __init__(self) -> None:
        self.rtts: dict[str, float] = {}
        self.now = 0.0
        self.tracker = PingTracker(self.ping, lambda: self.now)

    async def ping(self, peer: str) -> float:
        return self.rtts[peer]

    async def measure(self, **rtts: float) -> dict[str, float]:
        self.rtts = rtts
        await self.tracker.measure(rtts)
        return self.tracker.averages()


async def test_a_new_round_trip_weighs_a_fifth() -> None:
    """new = 0.2 rtt + 0.8 old."""
    network = Network()
    assert await network.measure(a=1.0) == {"a": 1.0}
    assert (await network.measure(a=2.0))["a"] == pytest.approx(1.2)


async def test_an_answer_after_silence_counts_whole() -> None:
    """Infinity is not averaged with."""
    network = Network()
    assert await network.measure(a=math.inf) == {"a": math.inf}
    assert await network.measure(a=0.5) == {"a": 0.5}


async def test_old_round_trips_are_forgotten() -> None:
    """After 300 s without a measurement a peer is gone."""
    network = Network()
    await network.measure(a=1.0)
    network.now = 299.0
    assert network.tracker.averages() == {"a": 1.0}
    network.now = 301.0
    assert network.tracker.averages() == {}


def test_targets_are_servers_of_inner_blocks_and_of_the_block_after_us() -> None:
    """Routes leave a server only at its end and enter others anywhere: both kinds are pinged, we are not."""
    blocks = {
        2: {"start": RECORD},
        3: {"inner": RECORD, "us": RECORD},
        4: {"next": RECORD},
        5: {"far": RECORD},
    }
    assert choose_targets(blocks, BlockSpan(2, 4), "us", random.Random(0)) == ["inner", "next"]


def test_at_most_five_of_each_kind_are_pinged() -> None:
    """Large swarms are sampled."""
    inner, following = ({f"{kind}{number}": RECORD for number in range(30)} for kind in "if")
    targets = choose_targets({1: inner, 2: following}, BlockSpan(0, 2), "us", random.Random(0))
    assert sorted(target[0] for target in targets) == ["f"] * 5 + ["i"] * 5
