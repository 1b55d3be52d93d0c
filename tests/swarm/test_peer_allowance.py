"""A peer's requests take its share of the time, whatever others do."""

from __future__ import annotations

import pytest

from petalsd.errors import Overloaded
from petalsd.swarm import peer_allowance
from petalsd.swarm.peer_allowance import TimeShares


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def taken(shares: TimeShares, clock: Clock, seconds: float, peer: str = "greedy") -> float:
    """What a peer gets that asks all the time for so long, ten milliseconds at a time."""
    total, end = 0.0, clock.now + seconds
    while clock.now < end:
        try:
            shares.check(peer)
        except Overloaded:
            clock.now += 0.1
            continue
        shares.charge(peer, 0.01)
        clock.now += 0.01
        total += 0.01
    return total


def test_who_asks_all_the_time_gets_a_burst_and_then_its_share() -> None:
    clock = Clock()
    shares = TimeShares(clock)
    burst, share = peer_allowance._TIME_BURST_S, peer_allowance._TIME_SHARE
    assert taken(shares, clock, 100.0) == pytest.approx(burst + 100.0 * share, rel=0.05)
    assert taken(shares, clock, 100.0) == pytest.approx(100.0 * share, rel=0.05)
    clock.now += burst / share
    assert taken(shares, clock, 100.0) == pytest.approx(burst + 100.0 * share, rel=0.05)


def test_others_have_theirs() -> None:
    clock = Clock()
    shares = TimeShares(clock)
    shares.charge("greedy", peer_allowance._TIME_BURST_S + 1.0)
    with pytest.raises(Overloaded, match="5% of this node's time"):
        shares.check("greedy")
    shares.check("modest")


def test_who_owes_is_remembered_among_many() -> None:
    """And only so many are."""
    clock = Clock()
    shares = TimeShares(clock)
    shares.charge("greedy", 10 * peer_allowance._TIME_BURST_S)
    for number in range(3 * peer_allowance._MAX_PEERS):
        shares.charge(f"identity {number}", 0.001)
        clock.now += 0.0001
    assert len(shares) <= peer_allowance._MAX_PEERS
    with pytest.raises(Overloaded):
        shares.check("greedy")
