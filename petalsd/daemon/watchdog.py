"""The ping is earned: by work that crossed the device since the last look, or by a canary that does so now."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable

import structlog

from petalsd.daemon.parts import ServingEngine
from petalsd.daemon.warnings import WarningBoard
from petalsd.engine.stats import EngineStats
from petalsd.errors import Draining, NotServed, PetalsdError
from petalsd.systemd import Notifier

log = structlog.get_logger(__name__)

# Without a watchdog of systemd's, trouble is still looked for and shown.
DEFAULT_INTERVAL_S = 60.0
# How much slower than anything seen so far a batch may be before it counts as a hang.
_PATIENCE = 4.0
# For how long a loop that was blocked, and moves again, stays a warning.
_REMEMBERED_S = 600.0


class Watchdog:
    """``on_trouble`` is called when the engine fails its canary: it can be healed in this process."""

    def __init__(
        self,
        engine: ServingEngine,
        notifier: Notifier,
        board: WarningBoard,
        on_trouble: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._notifier = notifier
        self._board = board
        self._on_trouble = on_trouble
        self._interval_s = notifier.watchdog_interval_s or DEFAULT_INTERVAL_S
        self._iterations = -1

    async def run(self) -> None:
        """Look four times per interval at least; two may fail to be made in time before a ping is late."""
        while True:
            stuck = await self._look()
            if (loss := self._engine.device_loss) is not None:
                # The process ends by itself; if it hangs at that, systemd ends it for want of a ping.
                self._board.set("device_lost", loss.message)
                return
            if stuck is None:
                self._notifier.watchdog()
            else:
                self._give_up(stuck)
            await asyncio.sleep(self._pause_s())

    def _pause_s(self) -> float:
        """Until the next look: when what the engine is at is overdue, if that comes first."""
        stats, longest_s = self._engine.stats(), self._interval_s / 4
        if stats.busy_since_monotonic_s is None:
            return longest_s
        due_s = stats.busy_since_monotonic_s + self._allowed_s(stats) - time.monotonic()
        return min(longest_s, due_s) if due_s > 0 else longest_s

    async def _look(self) -> str | None:
        """Why the engine counts as hung; None when it works or when there is nothing to hang."""
        stats = self._engine.stats()
        has_moved = stats.iterations_total != self._iterations
        self._iterations = stats.iterations_total
        if has_moved or stats.busy_since_monotonic_s is not None:
            return self._overdue(stats)
        try:
            async with asyncio.timeout(self._interval_s / 4):
                await self._engine.probe()
        except TimeoutError:
            return self._after_a_lost_canary(stats)
        except (Draining, NotServed):
            return None  # nothing is served: that the loop runs is all there is to prove
        except PetalsdError as error:
            log.error("engine_failed", reason=str(error))
            self._board.set("engine_failed", error.message)
            self._on_trouble()
            return None
        self._iterations = self._engine.stats().iterations_total  # the canary's own are no proof of the next
        self._board.clear("engine_failed", "engine_stuck")
        return None

    def _after_a_lost_canary(self, before: EngineStats) -> str | None:
        """It may have had to wait behind long work that moves."""
        now = self._engine.stats()
        if now.iterations_total != before.iterations_total or now.busy_since_monotonic_s is not None:
            return self._overdue(now)
        return f"a canary did not come back within {self._interval_s / 4:g} s from an idle engine"

    def _overdue(self, stats: EngineStats) -> str | None:
        """A batch may take as long as its tokens need, so that a long prefill is no hang."""
        if stats.busy_since_monotonic_s is None:
            return None
        busy_s = time.monotonic() - stats.busy_since_monotonic_s
        allowed_s = self._allowed_s(stats)
        if busy_s <= allowed_s:
            return None
        return (
            f"at one batch of {stats.busy_tokens} tokens for {busy_s:.1f} s, {allowed_s:.1f} s were allowed"
        )

    def _allowed_s(self, stats: EngineStats) -> float:
        return self._interval_s / 2 + _PATIENCE * stats.slowest_token_s * stats.busy_tokens

    def _give_up(self, reason: str) -> None:
        """A hung thread cannot be ended from inside: say why, and let systemd restart the process."""
        log.critical("engine_stuck", reason=reason, places=stack_of("petalsd-engine"))
        self._board.set("engine_stuck", reason)
        self._notifier.watchdog_trigger()
        self._on_trouble()


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
