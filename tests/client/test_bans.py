"""Bans grow with failures and end with time or success."""

from __future__ import annotations

from petalsd.client.bans import Bans


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_ban_ends_with_time() -> None:
    """15 s after the first failure the peer may be used again."""
    clock = Clock()
    bans = Bans(15.0, 1000.0, clock)
    assert bans.add("a") == 15.0
    clock.now += 14.9
    assert bans.current() == {"a"}
    clock.now += 0.2
    assert bans.current() == frozenset()


def test_each_failure_doubles_the_ban_up_to_a_limit() -> None:
    """15, 30, 60 … seconds."""
    clock = Clock()
    bans = Bans(15.0, 100.0, clock)
    durations = []
    for _ in range(5):
        durations.append(bans.add("a"))
        clock.now += 1000.0
    assert durations == [15.0, 30.0, 60.0, 100.0, 100.0]


def test_failures_at_the_same_time_count_once() -> None:
    """Eight calls that lose one server do not ban it for half an hour."""
    clock = Clock()
    bans = Bans(15.0, 1000.0, clock)
    for _ in range(8):
        bans.add("a")
    clock.now += 15.1
    assert "a" not in bans.current()


def test_success_clears_the_record() -> None:
    """After a success the next failure is a first one."""
    clock = Clock()
    bans = Bans(15.0, 1000.0, clock)
    bans.add("a")
    clock.now += 20
    bans.add("a")
    bans.clear("a")
    assert "a" not in bans.current()
    assert bans.add("a") == 15.0
