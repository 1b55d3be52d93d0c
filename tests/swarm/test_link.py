"""The speed of the network link, from transfers as they happen."""

from __future__ import annotations

import pytest

from petalsd.swarm.link import ASSUMED_MBPS, LARGE_BYTES, LinkMeter, LinkSpeed

MBIT = 1_000_000 // 8
ASSUMED = LinkSpeed(ASSUMED_MBPS, is_measured=False)


class Link:
    """A meter with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meter = LinkMeter(lambda: self.now)

    def carry(self, *rates_mbps: float, is_upload: bool) -> None:
        """One transfer of 2 s for each rate."""
        for mbps in rates_mbps:
            self.meter.flowed(int(2 * mbps * MBIT), 2.0, is_upload=is_upload)


def test_until_enough_was_seen_the_speed_is_assumed() -> None:
    """Four transfers are not enough, and neither are any number of small ones."""
    link = Link()
    link.carry(20, 20, 20, 20, is_upload=True)
    for _ in range(50):
        link.meter.flowed(LARGE_BYTES - 1, 0.001, is_upload=True)
    assert link.meter.speed() == ASSUMED


def test_the_slower_direction_counts() -> None:
    """A direction that nothing is known of counts as what is assumed."""
    link = Link()
    link.carry(*[500] * 5, is_upload=False)
    assert link.meter.speed() == ASSUMED
    link.carry(*[20] * 5, is_upload=True)
    assert link.meter.speed() == (pytest.approx(20), True)
    faster = Link()
    for is_upload in (True, False):
        faster.carry(*[900] * 5, is_upload=is_upload)
    assert faster.meter.speed() == (pytest.approx(900), True)


def test_the_best_transfers_tell_but_not_the_very_best() -> None:
    """Most are slowed down by the other side, and one may have been luck or a full buffer."""
    link = Link()
    link.carry(*[5] * 10, *[40] * 9, 4000, is_upload=True)
    assert link.meter.speed().mbps == pytest.approx(40)


def test_old_transfers_are_forgotten() -> None:
    link = Link()
    link.carry(*[10] * 5, is_upload=True)
    link.now = 3700.0
    assert link.meter.speed() == ASSUMED


def test_the_latency_of_a_peer_is_no_part_of_the_transfer() -> None:
    """What a small message takes is taken off, half of the time at most; nothing divides by zero."""
    link = Link()
    for seconds in (0.5, 0.2, 0.9):
        link.meter.acknowledged("near", 1000, seconds)
    for _ in range(5):
        link.meter.acknowledged("near", 10 * MBIT, 0.7)
    assert link.meter.speed().mbps == pytest.approx(20)
    slow = Link()
    slow.meter.acknowledged("far", 1000, 5.0)
    for _ in range(5):
        slow.meter.acknowledged("far", 10 * MBIT, 1.0)
        slow.meter.acknowledged("far", 10 * MBIT, 0.0)
    assert slow.meter.speed().mbps == pytest.approx(20)


def test_many_peers_take_no_more_memory() -> None:
    link = Link()
    for number in range(1000):
        link.meter.acknowledged(f"peer{number}", 10, 0.1)
    assert len(link.meter._latencies) <= 256
