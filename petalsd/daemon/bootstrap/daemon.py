"""The life of a bootstrap node: started, kept well, healed when its libp2p daemon dies, and taken down."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

import structlog

from petalsd.daemon.backoff import Backoff, retry
from petalsd.daemon.lifecycle import Lifecycle, Transitions
from petalsd.daemon.presence import SwarmPresence, presence_problem
from petalsd.daemon.signals import Signals
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import DeadlineExceeded, PetalsdError, SwarmError
from petalsd.log import error_fields
from petalsd.types import DaemonState

log = structlog.get_logger(__name__)

START_BACKOFF = Backoff(attempts=6, first_delay_s=1.0, max_delay_s=15.0)
_HEALTH_PERIOD_S = 5.0
_REFRESH_PERIOD_S = 30.0
_S = DaemonState
TRANSITIONS: Transitions = {
    _S.STARTING: frozenset({_S.ONLINE, _S.STOPPING, _S.FAILED}),
    _S.ONLINE: frozenset({_S.STARTING, _S.STOPPING, _S.FAILED}),
    _S.STOPPING: frozenset({_S.STOPPED, _S.FAILED}),
    _S.STOPPED: frozenset(),
    _S.FAILED: frozenset(),
}


class RefreshedPresence(SwarmPresence, Protocol):
    async def refresh(self) -> None:
        """Have the routing table forget who is gone. SwarmError or DeadlineExceeded."""


class BootstrapDaemon:
    """``run`` is its whole life."""

    def __init__(
        self,
        node: RefreshedPresence,
        signals: Signals,
        board: WarningBoard,
        backoff: Backoff = START_BACKOFF,
        health_period_s: float = _HEALTH_PERIOD_S,
    ) -> None:
        self._node = node
        self._signals = signals
        self._board = board
        self._backoff = backoff
        self._health_period_s = health_period_s
        self._refresh_at_s = 0.0
        self.lifecycle = Lifecycle(transitions=TRANSITIONS)
        self.lifecycle.subscribe(
            lambda old, new: log.info("state", old=old.value, new=new.value, reason=self.lifecycle.reason)
        )

    async def run(self) -> None:
        """Until a stop is asked for; raises what made it impossible to be there."""
        keeping = asyncio.create_task(self._keep(), name="keep")
        stop = asyncio.create_task(self._signals.stop.wait(), name="stop")
        try:
            await asyncio.wait({keeping, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            keeping.cancel()
            stop.cancel()
            results = await asyncio.gather(keeping, stop, return_exceptions=True)
            failure = next((one for one in results if isinstance(one, Exception)), None)
            self.lifecycle.move(_S.STOPPING if failure is None else _S.FAILED, str(failure or ""))
            await self._node.stop()
            if failure is None:
                self.lifecycle.move(_S.STOPPED)
        if failure is not None:
            raise failure

    async def _keep(self) -> None:
        """Start the node, and make it anew under the same identity whenever it breaks."""
        while True:
            await retry(self._node.start, self._backoff, (SwarmError, DeadlineExceeded), self._on_failure)
            self.lifecycle.move(_S.ONLINE)
            self._board.clear("p2pd_failed", "join_failed")
            problem = await self._until_broken()
            self._board.set("p2pd_failed", problem)
            self.lifecycle.move(_S.STARTING, problem)
            await self._node.stop()

    def _on_failure(self, error: Exception, delay_s: float) -> None:
        log.warning("start_failed", retry_s=delay_s, **error_fields(error))
        self._board.blame("join_failed", error)

    async def _until_broken(self) -> str:
        """Look at the libp2p daemon often; what is wrong with it in the end."""
        failure = asyncio.create_task(self._node.until_failed(), name="node-failure")
        self._refresh_at_s = time.monotonic() + _REFRESH_PERIOD_S
        try:
            while True:
                await asyncio.wait({failure}, timeout=self._health_period_s)
                problem = failure.result() if failure.done() else await presence_problem(self._node)
                if problem is not None:
                    return problem
                await self._refresh()
        finally:
            failure.cancel()

    async def _refresh(self) -> None:
        if time.monotonic() < self._refresh_at_s:
            return
        try:
            await self._node.refresh()
        except PetalsdError as error:  # whoever looks after the node says what is wrong with it
            log.debug("refresh_failed", error=str(error))
        self._refresh_at_s = time.monotonic() + _REFRESH_PERIOD_S
