"""Builds a bootstrap node from a configuration and runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import structlog

from petalsd.config import Config
from petalsd.control.access import Access
from petalsd.control.bootstrap_operations import BootstrapOperations
from petalsd.control.server import ControlServer
from petalsd.control.socket_file import SocketFile
from petalsd.daemon.beside import Works, beside
from petalsd.daemon.bootstrap.daemon import BootstrapDaemon
from petalsd.daemon.bootstrap.reporting import BootstrapAdministration, BootstrapReporter
from petalsd.daemon.directories import make_directories
from petalsd.daemon.disks import Disks
from petalsd.daemon.loop_watch import LoopWatch
from petalsd.daemon.node_options import node_options
from petalsd.daemon.reloading import Reloader
from petalsd.daemon.service import Service
from petalsd.daemon.settings import Settings
from petalsd.daemon.signals import Signals
from petalsd.daemon.surroundings import Surroundings
from petalsd.daemon.warnings import WarningBoard
from petalsd.instruments import Counter
from petalsd.log import adopt_loggers
from petalsd.metrics import CONTENT_TYPE, Metrics
from petalsd.paths import InstancePaths
from petalsd.swarm.bootstrap import BootstrapNode
from petalsd.systemd import Notifier
from petalsd.types import DaemonState

log = structlog.get_logger(__name__)

_LOOK_PERIOD_S = 5.0
_NUM_LOOKUPS = 64  # at once: a view of the swarm is a key for each block of each model


async def serve(config: Config, paths: InstancePaths, read: Callable[[], Config], notifier: Notifier) -> None:
    """Run until a stop signal; ``read`` loads the configuration again for a reload."""
    adopt_loggers(("hivemind",))
    make_directories(paths)
    board, metrics = WarningBoard(instance=paths.instance), Metrics()
    options = replace(node_options(config.swarm, paths, _NUM_LOOKUPS), use_auto_relay=False)
    node = BootstrapNode(options)
    if any("/tcp/0" in maddr for maddr in options.host_maddrs):
        board.set("port_changes", ", ".join(options.host_maddrs))
    with Signals() as signals:
        daemon = BootstrapDaemon(node, signals, board)
        reporter = BootstrapReporter(daemon, node, board, paths.instance, notifier)
        service = Service(notifier, reporter.line)
        daemon.lifecycle.subscribe(service.on_move)
        healed = metrics.counter("rebalances_total").labels("member_broken")
        daemon.lifecycle.subscribe(partial(_count_healing, healed))
        disks = Disks({"state": paths.state_dir})
        metrics.read_from(reporter.readings)
        metrics.read_from(disks.readings)
        reloader = Reloader(Settings(config, read, lambda new: None), None, service, board)
        administration = BootstrapAdministration(daemon, reporter, reloader)
        access = Access.of(config.control.group)
        control = ControlServer(
            BootstrapOperations(administration, lambda: (metrics.exposition(), CONTENT_TYPE)),
            SocketFile(config.control.socket or paths.control_socket, access),
            access,
            config.metrics.listen,
        )
        works: Works = {
            "service": service.run,
            "watchdog": partial(_feed, notifier),
            "loop-watch": LoopWatch(notifier.proof_interval_s / 2, board).run,
            "reachability": partial(_watch_reachability, node, board),
            "surroundings": Surroundings(node, disks, board).run,
            "reloader": partial(reloader.run, signals.reload),
            "stop-notice": partial(service.notice_stop, signals.stop),
        }
        async with beside(control, works):
            await daemon.run()
    log.info("stopped")


def _count_healing(healed: Counter, old: DaemonState, new: DaemonState) -> None:
    if old is DaemonState.ONLINE and new is DaemonState.STARTING:
        healed.inc()


async def _feed(notifier: Notifier) -> None:
    """That the loop runs is what a restart could mend: the libp2p daemon is looked after, and replaced, in it."""
    while True:
        notifier.watchdog()
        await asyncio.sleep(notifier.proof_interval_s / 4)


async def _watch_reachability(node: BootstrapNode, board: WarningBoard) -> None:
    """Nobody joins through a node that cannot be dialled."""
    while True:
        board.note("unreachable", "" if node.stats().is_reachable is False else None)
        await asyncio.sleep(_LOOK_PERIOD_S)
