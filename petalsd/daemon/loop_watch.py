"""A main loop that is blocked, and where."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
import traceback

import structlog

from petalsd.daemon.warnings import WarningBoard

log = structlog.get_logger(__name__)

# For how long a loop that was blocked, and moves again, stays a warning.
_REMEMBERED_S = 600.0


class LoopWatch:
    """A thread that says where the loop hangs when it does: a blocked loop cannot say so itself.

    A loop that moves again warns of what was: clients have waited, and nobody could be asked meanwhile.
    """

    def __init__(self, limit_s: float, board: WarningBoard) -> None:
        self._limit_s = limit_s
        self._board = board
        self._beat_s = time.monotonic()
        self._stuck_s = -math.inf
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="petalsd-loop-watch", daemon=True)

    async def run(self) -> None:
        """Beat until cancelled; the watch lasts as long."""
        self._beat_s = time.monotonic()
        self._thread.start()
        try:
            while True:
                await asyncio.sleep(self._limit_s / 4)
                self._beat()
        finally:
            self._over.set()

    def _beat(self) -> None:
        before_s, self._beat_s = self._beat_s, time.monotonic()
        silent_s = self._beat_s - before_s
        if silent_s > self._limit_s:
            self._stuck_s = self._beat_s
            self._board.set("loop_stuck", f"for {silent_s:.1f} s")
        elif self._beat_s - self._stuck_s > _REMEMBERED_S:
            self._board.clear("loop_stuck")

    def _watch(self) -> None:
        was_stuck = False
        while not self._over.wait(self._limit_s / 4):
            silent_s = time.monotonic() - self._beat_s
            is_stuck = silent_s > self._limit_s
            if is_stuck and not was_stuck:
                log.critical("loop_stuck", silent_s=round(silent_s, 1), places=stack_of("MainThread"))
            elif was_stuck and not is_stuck:
                log.warning("loop_moves_again")
            was_stuck = is_stuck


def stack_of(thread_name: str) -> list[str]:
    """Where that thread is, innermost call last: files and lines only, since values could be activations."""
    for thread in threading.enumerate():
        if thread.name == thread_name and thread.ident is not None:
            frame = sys._current_frames().get(thread.ident)
            places = traceback.extract_stack(frame)[-12:] if frame is not None else []
            return [f"{place.filename}:{place.lineno} {place.name}" for place in places]
    return []
