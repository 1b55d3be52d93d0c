"""How often one event is logged, on a clock of the test's own."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from petalsd.journal import MESSAGE_IDS
from petalsd.log import configure_logging
from petalsd.log_limits import BURST, PERIOD_S, LimitedHandler, RateLimiter, Suppressed

KEY = ("petalsd.swarm", "bad_push")


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_burst_passes_and_the_rest_is_counted(clock: Clock) -> None:
    """Per key; the worst level of what was left out is remembered."""
    limiter = RateLimiter(burst=3, period_s=10, clock=clock)
    assert [limiter.admits(KEY, logging.INFO) for _ in range(5)] == [True] * 3 + [False] * 2
    assert limiter.admits(("petalsd.swarm", "other"), logging.INFO)
    assert not limiter.admits(KEY, logging.ERROR)
    clock.now_s += 9.9
    assert limiter.ended() == []
    clock.now_s += 0.1
    assert limiter.ended() == [Suppressed(KEY, 3, logging.ERROR)]
    assert limiter.admits(KEY, logging.INFO)


def test_what_never_exceeded_the_burst_is_not_reported(clock: Clock) -> None:
    """A quiet event costs nothing when its period ends."""
    limiter = RateLimiter(burst=3, period_s=10, clock=clock)
    limiter.admits(KEY, logging.INFO)
    clock.now_s += 60
    assert limiter.ended() == []


def test_memory_is_bounded_and_no_count_is_lost(clock: Clock) -> None:
    """Too many keys close the oldest period early."""
    limiter = RateLimiter(burst=1, period_s=10, clock=clock, max_keys=4)
    counted = 0
    for number in range(100):
        for _ in range(3):
            counted += sum(period.count for period in limiter.ended())
            limiter.admits(("library", str(number)), logging.WARNING)
        assert len(limiter._windows) <= 5
    counted += sum(period.count for period in limiter.ended(all_of_them=True))
    assert counted == 200


@pytest.fixture
def lines(clock: Clock) -> Iterator[Any]:
    """Logging as JSON under limits on the test's clock; call it for what was logged since."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    out = io.StringIO()
    configure_logging("json", "debug", out)
    (limited,) = root.handlers
    assert isinstance(limited, LimitedHandler)
    limited._limiter = RateLimiter(clock=clock)

    def taken() -> list[dict[str, Any]]:
        text = out.getvalue()
        out.seek(0)
        out.truncate()
        return [json.loads(line) for line in text.splitlines()]

    yield taken
    root.handlers = handlers
    root.setLevel(level)


def test_a_peer_cannot_flood_the_log(lines: Any, clock: Clock) -> None:
    """What it triggers again and again is logged a few times, then summed up when something else is logged."""
    log = structlog.get_logger("petalsd.swarm")
    for number in range(10_000):
        log.info("bad_push", peer="p", error=f"number {number}")
    assert [line["event"] for line in lines()] == ["bad_push"] * BURST
    clock.now_s += PERIOD_S
    log.info("announced")
    summary, announced = lines()
    assert announced["event"] == "announced"
    wanted = {"event": "events_suppressed", "what": "bad_push", "by": "petalsd.swarm", "level": "info",
              "suppressed": 10_000 - BURST, "period_s": PERIOD_S}  # fmt: skip
    assert summary.items() >= wanted.items()


def test_lines_of_libraries_count_by_their_place(lines: Any) -> None:
    """Their text may hold what a peer sent: it cannot make a line a new one."""
    library = logging.getLogger("some_library.part")
    for number in range(100):
        library.warning("peer said %s", number)
    library.warning("from elsewhere")
    assert len(lines()) == BURST + 1


@pytest.mark.parametrize("event", MESSAGE_IDS)
def test_what_one_alerts_on_always_passes(lines: Any, event: str) -> None:
    """However often it happens."""
    for _ in range(BURST + 5):
        structlog.get_logger("petalsd.x").warning(event)
    assert len(lines()) == BURST + 5


def test_who_debugs_sees_everything(lines: Any) -> None:
    """Lines at level debug are only there when asked for."""
    for _ in range(BURST + 5):
        structlog.get_logger("petalsd.x").debug("session_opened")
    assert len(lines()) == BURST + 5


def test_the_end_of_the_process_ends_the_periods(lines: Any) -> None:
    """Nothing stays untold."""
    for _ in range(BURST + 2):
        structlog.get_logger("petalsd.x").info("again")
    lines()
    logging.getLogger().handlers[0].close()
    (summary,) = lines()
    assert summary["suppressed"] == 2
