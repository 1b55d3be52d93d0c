"""Letting running sessions finish: a wait with a deadline that can be cut short."""

from __future__ import annotations

import asyncio
import time

import structlog

from petalsd.daemon.parts import ServingEngine

log = structlog.get_logger(__name__)

_POLL_S = 0.1
_REPORT_PERIOD_S = 10.0


async def wait_until_idle(engine: ServingEngine, deadline_s: float, cut_short: asyncio.Event) -> int:
    """Wait until no session and no pass is left, the deadline is over or ``cut_short`` is set; what is left."""
    end_s = time.monotonic() + deadline_s
    report_s = time.monotonic()
    while (left := open_work(engine)) and not cut_short.is_set() and (now_s := time.monotonic()) < end_s:
        if now_s >= report_s:
            report_s = now_s + _REPORT_PERIOD_S
            log.info("draining", sessions_and_passes=left, left_s=round(end_s - now_s, 1))
        await _pause(cut_short, min(_POLL_S, end_s - now_s))
    return left


def open_work(engine: ServingEngine) -> int:
    stats = engine.stats()
    return stats.sessions + stats.queued_passes


async def _pause(cut_short: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await cut_short.wait()
    except TimeoutError:
        pass
