"""What goes on beside serving as long as the daemon runs: service manager, watchdog, reloads, control socket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial

from petalsd.config import Config
from petalsd.control.access import Access
from petalsd.control.operations import ServerOperations
from petalsd.control.server import ControlServer
from petalsd.control.socket_file import SocketFile
from petalsd.daemon.administration import Administration
from petalsd.daemon.beside import Works, beside
from petalsd.daemon.components import Parts
from petalsd.daemon.daemon import Daemon
from petalsd.daemon.disks import Disks
from petalsd.daemon.figures import Figures
from petalsd.daemon.loop_watch import LoopWatch
from petalsd.daemon.plan import ServingPlan
from petalsd.daemon.reloading import Reloader
from petalsd.daemon.reporting import Reporter
from petalsd.daemon.service import Service
from petalsd.daemon.signals import Signals
from petalsd.daemon.surroundings import Surroundings
from petalsd.daemon.watchdog import Watchdog
from petalsd.metrics import CONTENT_TYPE
from petalsd.paths import InstancePaths
from petalsd.systemd import Notifier


class Attendants:
    """``attending`` starts them all and ends them after the daemon."""

    def __init__(
        self, daemon: Daemon, parts: Parts, plan: ServingPlan, paths: InstancePaths, notifier: Notifier
    ) -> None:
        self._daemon = daemon
        self._parts = parts
        self._paths = paths
        reporter = Reporter(daemon, parts, plan, paths.instance, notifier)
        self._service = Service(notifier, reporter.line)
        self._reloader = Reloader(parts.settings, parts.supervisor.check_now, self._service, parts.board)
        self._watchdog = Watchdog(parts.engine, notifier, parts.board, parts.supervisor.check_now)
        self._loop_watch = LoopWatch(notifier.proof_interval_s / 2, parts.board)
        disks = Disks({"state": paths.state_dir, "cache": paths.cache_dir})
        parts.metrics.read_from(Figures(daemon, parts, plan, disks, notifier).read)
        self._surroundings = Surroundings(parts.member, disks, parts.board)
        self._administration = Administration(daemon, parts, plan.model.num_blocks, reporter, self._reloader)

    @contextlib.asynccontextmanager
    async def attending(self, signals: Signals) -> AsyncIterator[None]:
        """As ``ControlServer.start`` when the control socket or the metrics' address cannot be had."""
        self._daemon.lifecycle.subscribe(self._service.on_move)
        works: Works = {
            "service": self._service.run,
            "watchdog": self._watchdog.run,
            "loop-watch": self._loop_watch.run,
            "surroundings": self._surroundings.run,
            "reloader": partial(self._reloader.run, signals.reload),
            "stop-notice": partial(self._service.notice_stop, signals.stop),
        }
        async with beside(self._control_server(self._parts.settings.config), works):
            yield

    def _control_server(self, config: Config) -> ControlServer:
        """ConfigError for a group that does not exist."""
        access = Access.of(config.control.group)
        return ControlServer(
            ServerOperations(self._administration, lambda: (self._parts.metrics.exposition(), CONTENT_TYPE)),
            SocketFile(config.control.socket or self._paths.control_socket, access),
            access,
            config.metrics.listen,
        )
