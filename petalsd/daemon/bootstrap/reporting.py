"""What a bootstrap node says of itself, and what can be asked of it: documents, a line, gauges."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from petalsd import __version__
from petalsd.bootstrap_status import BootstrapStatus, BootstrapWatchdog, InitialPeers, SwarmModel, SwarmPeers
from petalsd.daemon.bootstrap.daemon import BootstrapDaemon
from petalsd.daemon.peer_list import peer_entries, uncovered
from petalsd.daemon.reloading import Reloader
from petalsd.daemon.state_figures import age_s, build_reading, state_readings, watchdog_readings
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import SwarmError
from petalsd.metrics import Reading
from petalsd.status import Reloaded
from petalsd.swarm.bootstrap import BootstrapNode
from petalsd.systemd import Notifier
from petalsd.types import DaemonState

_HINDERING = ("join_failed", "p2pd_failed")


class BootstrapReporter:
    """Reads the parts; asks nobody outside this process but for ``peers``."""

    def __init__(
        self,
        daemon: BootstrapDaemon,
        node: BootstrapNode,
        board: WarningBoard,
        instance: str,
        notifier: Notifier,
    ) -> None:
        self._daemon = daemon
        self._node = node
        self._board = board
        self._instance = instance
        self._notifier = notifier
        self._started_s = time.monotonic()

    def line(self) -> str:
        """What it is at, in a sentence."""
        state, reason = self._daemon.lifecycle.state, self._daemon.lifecycle.reason
        if state is DaemonState.ONLINE:
            stats = self._node.stats()
            known, kept = _counted(stats.known_peers, "peer"), _counted(stats.stored_keys, "key")
            return f"Bootstrap node: {known} known, {kept} of the directory kept"
        trouble = [one.title for one in self._board.active() if one.code in _HINDERING]
        if state is DaemonState.STARTING and trouble:
            return f"Starting: {trouble[0]}; it is tried again"
        return f"{state.value.capitalize()}: {reason}" if reason else state.value.capitalize()

    def status(self) -> BootstrapStatus:
        lifecycle, stats, ping_s = (
            self._daemon.lifecycle,
            self._node.stats(),
            self._notifier.last_ping_monotonic_s,
        )
        return BootstrapStatus(
            version=__version__,
            instance=self._instance,
            state=lifecycle.state.value,
            reason=lifecycle.reason,
            summary=self.line(),
            since_s=_age(lifecycle.since_s),
            uptime_s=_age(self._started_s),
            pid=os.getpid(),
            peer_id=self._peer_id(),
            maddrs=list(self._node.known_maddrs),
            is_reachable=stats.is_reachable,
            initial_peers=InitialPeers(total=stats.initial_peers, known=stats.known_initial),
            known_peers=stats.known_peers,
            stored_keys=stats.stored_keys,
            watchdog=BootstrapWatchdog(
                interval_s=self._notifier.watchdog_interval_s,
                last_ping_s=None if ping_s is None else _age(ping_s),
            ),
            warnings=self._board.documents(),
        )

    async def peers(self) -> SwarmPeers:
        """SwarmError or DeadlineExceeded when the directory cannot be read."""
        models = await self._node.read_models()
        servers = {remote.peer for model in models for remote in model.view.spans()}
        pings = await self._node.pings(sorted(servers))
        return SwarmPeers(
            models=[
                SwarmModel(
                    dht_prefix=model.view.prefix,
                    repository=model.repository,
                    num_blocks=model.view.num_blocks,
                    peers=peer_entries(model.view, pings, None),
                    uncovered=uncovered(model.view),
                )
                for model in models
            ]
        )

    def readings(self) -> Iterator[Reading]:
        """``metrics.Source``"""
        stats, lifecycle = self._node.stats(), self._daemon.lifecycle
        raised = {warning.code for warning in self._board.active()}
        yield build_reading()
        yield from state_readings(lifecycle, self._board)
        yield from watchdog_readings(self._notifier)
        is_online = lifecycle.state is DaemonState.ONLINE
        yield Reading("dht_in_touch", is_online and "swarm_unreachable" not in raised)
        yield Reading("dht_known_peers", stats.known_peers)
        yield Reading("dht_stored_keys", stats.stored_keys)

    def _peer_id(self) -> str | None:
        try:
            return self._node.peer_id
        except SwarmError:  # not started just now
            return None


class BootstrapAdministration:
    """``control.api.DaemonApi`` over the real daemon."""

    def __init__(self, daemon: BootstrapDaemon, reporter: BootstrapReporter, reloader: Reloader) -> None:
        self._daemon = daemon
        self._reporter = reporter
        self._reloader = reloader
        self.problem: str | None = None  # what can be healed is healed inside

    @property
    def is_ready(self) -> bool:
        return self._daemon.lifecycle.state is DaemonState.ONLINE

    def status(self) -> BootstrapStatus:
        return self._reporter.status()

    async def peers(self) -> SwarmPeers:
        return await self._reporter.peers()

    async def reload(self) -> Reloaded:
        outcome = await self._reloader.reload()
        return Reloaded(applied=list(outcome.applied), needs_restart=list(outcome.pending))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _age(since_monotonic_s: float) -> float:
    return round(age_s(since_monotonic_s), 3)
