"""What goes on beside serving for as long as the daemon runs: service manager, watchdog, reloads, warnings."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import structlog

from petalsd.daemon.activity import Situation, describe
from petalsd.daemon.daemon import Daemon, Parts
from petalsd.daemon.drain import open_work
from petalsd.daemon.plan import ServingPlan
from petalsd.daemon.reloading import Reloader
from petalsd.daemon.service import Service
from petalsd.daemon.signals import Signals
from petalsd.daemon.surroundings import Surroundings
from petalsd.daemon.watchdog import DEFAULT_INTERVAL_S, LoopWatch, Watchdog
from petalsd.paths import InstancePaths
from petalsd.systemd import Notifier
from petalsd.types import DaemonState

log = structlog.get_logger(__name__)


class Attendants:
    """``attending`` starts them all and ends them after the daemon."""

    def __init__(
        self, daemon: Daemon, parts: Parts, plan: ServingPlan, paths: InstancePaths, notifier: Notifier
    ) -> None:
        interval_s = notifier.watchdog_interval_s or DEFAULT_INTERVAL_S
        self._daemon = daemon
        self._parts = parts
        self._plan = plan
        self.service = Service(notifier, self._line)
        self.reloader = Reloader(parts.settings, parts.supervisor, self.service, parts.board)
        self._watchdog = Watchdog(parts.engine, notifier, parts.board, parts.supervisor.check_now)
        self._loop_watch = LoopWatch(interval_s / 2)
        self._surroundings = Surroundings(parts.member, (paths.state_dir, paths.cache_dir), parts.board)

    @contextlib.asynccontextmanager
    async def attending(self, signals: Signals) -> AsyncIterator[None]:
        self._daemon.lifecycle.subscribe(self.service.on_move)
        tasks = [
            asyncio.create_task(_lasting(name, work), name=name)
            for name, work in (
                ("service", self.service.run()),
                ("watchdog", self._watchdog.run()),
                ("loop-watch", self._loop_watch.run()),
                ("surroundings", self._surroundings.run()),
                ("reloader", self.reloader.run(signals.reload)),
                ("stop-notice", self._notice_stop(signals)),
            )
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _notice_stop(self, signals: Signals) -> None:
        await signals.stop.wait()
        self.service.stopping()

    def _line(self) -> str:
        return describe(self.situation())

    def situation(self) -> Situation:
        daemon, activity = self._daemon, self._parts.activity
        state = daemon.lifecycle.state
        return Situation(
            state=state,
            reason=daemon.lifecycle.reason,
            activity=activity.text,
            progress=activity.progress,
            span=daemon.span,
            num_blocks=self._plan.model.num_blocks,
            model=self._plan.prefix,
            sessions=open_work(self._parts.engine),
            cache_used=_cache_used(self._parts),
            deadline_left_s=daemon.drain.deadline_left_s
            if daemon.drain is not None and state is DaemonState.DRAINING
            else None,
        )


def _cache_used(parts: Parts) -> float:
    pool = parts.engine.pool
    if pool is None:
        return 0.0
    stats = pool.stats()
    return 1.0 - stats.pages_free / max(1, stats.pages_total)


async def _lasting(name: str, work: Coroutine[Any, Any, None]) -> None:
    """A bug in one of them must be seen, and must not end the serving."""
    try:
        await work
    except Exception:
        log.exception("attendant_failed", name=name)
