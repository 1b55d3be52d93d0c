"""The ping is earned: by work that crossed the device since the last look, or by a canary that does so now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from petalsd.daemon.loop_watch import stack_of
from petalsd.daemon.parts import ServingEngine
from petalsd.daemon.warnings import WarningBoard
from petalsd.engine.stats import EngineStats
from petalsd.errors import Draining, NotServed, PetalsdError
from petalsd.systemd import Notifier

log = structlog.get_logger(__name__)

# How much slower than anything seen so far a batch may be before it counts as a hang.
_PATIENCE = 4.0


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
        self._interval_s = notifier.proof_interval_s
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
