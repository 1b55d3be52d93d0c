"""The daemon: brings the parts up, serves one span after the other, and takes everything down in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog

from petalsd.daemon.backoff import Backoff, retry
from petalsd.daemon.drain import wait_until_idle
from petalsd.daemon.health import engine_problem
from petalsd.daemon.lifecycle import Lifecycle, Presence
from petalsd.daemon.parts import ServingEngine, SwarmMember
from petalsd.daemon.plan import Demand
from petalsd.daemon.rebalancer import Rebalancer
from petalsd.daemon.settings import Settings
from petalsd.daemon.signals import Signals
from petalsd.daemon.span_loader import SpanLoader
from petalsd.daemon.supervisor import Cause, Departure, Supervisor
from petalsd.errors import DeadlineExceeded, Draining, EngineError, PetalsdError, SwarmError
from petalsd.log import error_fields
from petalsd.models.block import TransformerBlock
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan, DaemonState

log = structlog.get_logger(__name__)

JOIN_BACKOFF = Backoff(attempts=6, first_delay_s=1.0, max_delay_s=15.0)
# Consecutive failures to get a span served, after which the process gives up and its supervisor restarts it.
MAX_FAILED_ROUNDS = 5
_FAREWELL_S = 5.0  # for OFFLINE to be stored; the records expire by themselves if it is not
_PART_STOP_S = 5.0

HandOver = Callable[[BlockSpan, Mapping[int, TransformerBlock]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that the daemon owns; made by ``assembly``.

    prepare    what has to be known before the first announcement (the measured throughput)
    hand_over  gives loaded blocks and a fresh KV pool to the engine
    demand     which blocks the configuration in force asks for
    """

    engine: ServingEngine
    member: SwarmMember
    loader: SpanLoader
    rebalancer: Rebalancer
    supervisor: Supervisor
    settings: Settings
    prepare: Callable[[], Awaitable[None]]
    hand_over: HandOver
    demand: Callable[[], Demand]


class Daemon:
    """``run`` is its whole life."""

    def __init__(self, parts: Parts, signals: Signals, join_backoff: Backoff = JOIN_BACKOFF) -> None:
        self._parts = parts
        self._signals = signals
        self._join_backoff = join_backoff
        self._span: BlockSpan | None = None
        self._failed_rounds = 0
        self.lifecycle = Lifecycle()
        self.lifecycle.subscribe(
            lambda old, new: log.info("state", old=old.value, new=new.value, reason=self.lifecycle.reason)
        )

    async def run(self) -> None:
        """Serve until a stop is asked for; raises what made serving impossible, after leaving the swarm."""
        serving = asyncio.create_task(self._serve(), name="serve")
        reloading = asyncio.create_task(self._reload_on_signal(), name="reload")
        stop = asyncio.create_task(self._signals.stop.wait(), name="stop")
        try:
            await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (serving, reloading, stop):
                task.cancel()
            await asyncio.gather(serving, reloading, stop, return_exceptions=True)
            failure = None if serving.cancelled() else serving.exception()
            await self._stop(failure)
        if failure is not None:
            raise failure

    async def _serve(self) -> None:
        """One round per span: choose, load, serve, watch, leave."""
        await self._start()
        while True:
            try:
                span = await self._choose()
                await self._take(span)
                self._failed_rounds = 0
                departure = await self._parts.supervisor.until_departure(span)
            except (SwarmError, DeadlineExceeded) as error:
                departure = self._failed_round(Cause.MEMBER_BROKEN, error)
            except EngineError as error:
                departure = self._failed_round(Cause.ENGINE_BROKEN, error)
            await self._leave(departure)

    async def _start(self) -> None:
        await self._parts.prepare()
        await self._parts.engine.start()
        await self._join()

    async def _choose(self) -> BlockSpan:
        delay_s = self._parts.settings.config.blocks.join_delay_s
        return await self._parts.rebalancer.choose(self._parts.demand(), delay_s)

    async def _take(self, span: BlockSpan) -> None:
        """Announce, load, prove and serve ``span``; ONLINE is announced when it is true and not before."""
        parts = self._parts
        self.lifecycle.move(DaemonState.LOADING, f"blocks {span}")
        self._span = span
        await parts.member.announce(ServerState.JOINING, span)
        blocks = await parts.loader.load(span)
        try:
            await parts.hand_over(span, blocks)
        except DeadlineExceeded as error:  # the engine's, where others are the swarm's
            raise EngineError(error.message) from error
        if problem := await engine_problem(parts.engine):
            raise EngineError(problem)
        parts.member.admit()
        await parts.member.announce(ServerState.ONLINE, span)
        self.lifecycle.move(DaemonState.ONLINE)
        log.info("online", span=str(span), peer_id=parts.member.peer_id, maddrs=await parts.member.maddrs())

    async def _leave(self, departure: Departure) -> None:
        """OFFLINE first, then no new sessions, then end those that are here; broken parts are made anew."""
        log.info("leaving", span=str(self._span), cause=departure.cause.value, reason=departure.reason)
        if self.lifecycle.can_move(DaemonState.REBALANCING):
            self.lifecycle.move(DaemonState.REBALANCING, departure.reason)
        if departure.cause is not Cause.MEMBER_BROKEN:
            await self._announce_offline()
        self._parts.member.refuse("this server moves to other blocks")
        await self._drop_span(f"the server gives up these blocks: {departure.reason}")
        if departure.cause is Cause.ENGINE_BROKEN:
            await self._parts.engine.stop(_PART_STOP_S)
            await self._parts.engine.start()
        if departure.cause is Cause.MEMBER_BROKEN:
            await self._parts.member.stop()
            await self._join()
            await self._announce_offline()
        self._span = None

    async def _stop(self, failure: BaseException | None) -> None:
        """Say goodbye, let sessions finish, take the parts down from the outside in."""
        parts, state = self._parts, self.lifecycle.state
        was_online, was_present = state is DaemonState.ONLINE, self.lifecycle.presence is not Presence.ABSENT
        if was_online and failure is None:
            self.lifecycle.move(DaemonState.DRAINING, "stop requested")
        if was_present:
            await self._announce_offline()
        parts.member.refuse("this server is stopping")
        if self.lifecycle.state is DaemonState.DRAINING:
            await self._drain()
        self.lifecycle.move(
            DaemonState.STOPPING if failure is None else DaemonState.FAILED, _reason_of(failure)
        )
        await self._drop_span("the server is stopping")
        await parts.member.stop()
        await parts.engine.stop(_PART_STOP_S)
        parts.loader.drop_outside(None)
        if failure is None:
            self.lifecycle.move(DaemonState.STOPPED)

    async def _drain(self) -> None:
        deadline_s = self._parts.settings.config.daemon.drain_deadline_s
        left = await wait_until_idle(self._parts.engine, deadline_s, self._signals.now)
        if left:
            log.warning("drain_abandoned", sessions_and_passes=left, was_cut_short=self._signals.now.is_set())
        else:
            self.lifecycle.move(DaemonState.DRAINED)

    async def _join(self) -> None:
        await retry(
            self._parts.member.start,
            self._join_backoff,
            (SwarmError, DeadlineExceeded),
            lambda error, delay_s: log.warning("join_failed", retry_s=delay_s, **error_fields(error)),
        )

    async def _announce_offline(self) -> None:
        """As well as the swarm allows: leaving must not hang on a swarm that is gone."""
        if self._span is None:
            return
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self._parts.member.announce(ServerState.OFFLINE, self._span)
        except (SwarmError, DeadlineExceeded, TimeoutError) as error:
            log.warning("offline_not_stored", span=str(self._span), **error_fields(error))

    async def _drop_span(self, reason: str) -> None:
        with contextlib.suppress(Draining):  # the engine was never started
            try:
                async with asyncio.timeout(_PART_STOP_S):
                    await self._parts.engine.drop_span(reason)
            except (TimeoutError, DeadlineExceeded) as error:
                log.error("engine_holds_on", **error_fields(error))

    def _failed_round(self, cause: Cause, error: PetalsdError) -> Departure:
        """A span that could not be taken: try anew, but not forever."""
        self._failed_rounds += 1
        log.warning("round_failed", failures=self._failed_rounds, **error_fields(error))
        if self._failed_rounds >= MAX_FAILED_ROUNDS:
            raise error
        return Departure(cause, str(error))

    async def _reload_on_signal(self) -> None:
        """SIGHUP: read the configuration again, then look at the placement at once."""
        while True:
            await self._signals.reload.wait()
            self._signals.reload.clear()
            if self._parts.settings.reload() is not None:
                self._parts.supervisor.check_now()


def _reason_of(failure: BaseException | None) -> str:
    return "" if failure is None else str(failure)
