"""A bound on how often one event is logged, so that what a peer sends cannot flood the log."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import structlog

log = structlog.get_logger(__name__)

BURST = 20
PERIOD_S = 30.0
_MAX_KEYS = 512

Key = tuple[str, str]


@dataclass(slots=True)
class _Window:
    started_s: float
    count: int = 0
    suppressed: int = 0
    level: int = logging.INFO


@dataclass(frozen=True, slots=True)
class Suppressed:
    """What was left out of the log in one period that is over. ``level``: the most severe of it."""

    key: Key
    count: int
    level: int


class RateLimiter:
    """Lets ``burst`` events of a key pass in ``period_s`` and counts the rest. For one thread at a time."""

    def __init__(
        self,
        burst: int = BURST,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
        max_keys: int = _MAX_KEYS,
    ) -> None:
        self._burst = burst
        self.period_s = period_s
        self._clock = clock
        self._max_keys = max_keys
        self._windows: OrderedDict[Key, _Window] = OrderedDict()  # the one that began first, first

    def admits(self, key: Key, level: int) -> bool:
        """Count an event; whether it may be logged."""
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(self._clock())
        window.count += 1
        if window.count <= self._burst:
            return True
        window.suppressed += 1
        window.level = max(window.level, level)
        return False

    def ended(self, *, all_of_them: bool = False) -> list[Suppressed]:
        """Close the periods that are over, and the oldest where there are too many; what they suppressed."""
        closed = []
        end_s = self._clock() - self.period_s
        while self._windows:
            key, window = next(iter(self._windows.items()))
            if not (all_of_them or window.started_s <= end_s or len(self._windows) > self._max_keys):
                break
            del self._windows[key]
            if window.suppressed:
                closed.append(Suppressed(key, window.suppressed, window.level))
        return closed


class LimitedHandler(logging.Handler):
    """Hands records on to ``target`` as far as the limits allow, and says what they held back.

    An event of ours counts by its name, a library's line by the place that logs it: neither can be multiplied from
    outside. ``unlimited`` names events that always pass; so does what only somebody who debugs has asked for.
    """

    def __init__(self, target: logging.Handler, limiter: RateLimiter, unlimited: Collection[str]) -> None:
        super().__init__()
        self._target = target
        self._limiter = limiter
        self._unlimited = frozenset({*unlimited, "events_suppressed"})

    def emit(self, record: logging.LogRecord) -> None:
        self._report(self._limiter.ended())
        event = record.msg.get("event") if isinstance(record.msg, dict) else None
        is_limited = record.levelno > logging.DEBUG and event not in self._unlimited
        name = str(event) if event is not None else f"{record.filename}:{record.lineno}"
        if not is_limited or self._limiter.admits((record.name, name), record.levelno):
            self._target.handle(record)

    def flush(self) -> None:
        self._target.flush()

    def close(self) -> None:
        """At the end of the process the open periods end too."""
        self._report(self._limiter.ended(all_of_them=True))
        self._target.close()
        super().close()

    def _report(self, periods: list[Suppressed]) -> None:
        for period in periods:
            logger, name = period.key
            log.log(
                period.level,
                "events_suppressed",
                what=name,
                by=logger,
                suppressed=period.count,
                period_s=self._limiter.period_s,
            )
