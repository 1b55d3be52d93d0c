"""The daemon: brings the parts up, serves one span after the other, and takes everything down in order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable

import structlog
import torch

from petalsd.daemon.arrival import Arrival
from petalsd.daemon.backoff import Backoff
from petalsd.daemon.claiming import claim
from petalsd.daemon.components import Parts
from petalsd.daemon.drain import Drain, Hold
from petalsd.daemon.joining import JOIN_BACKOFF, join
from petalsd.daemon.lifecycle import Lifecycle
from petalsd.daemon.mover import Move, MoveFailed, Mover, Route, while_member_lives
from petalsd.daemon.refusals import cannot_move, did_not_begin
from petalsd.daemon.signals import Signals
from petalsd.daemon.supervisor import Cause, Departure
from petalsd.device_faults import device_loss
from petalsd.errors import Conflict, DeadlineExceeded, Draining, EngineError, PetalsdError, SwarmError
from petalsd.log import error_fields
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan, DaemonState

log = structlog.get_logger(__name__)

# Consecutive failures to get a span served, after which the process gives up and its supervisor restarts it.
MAX_FAILED_ROUNDS = 5
_FAREWELL_S = 5.0  # for OFFLINE to be stored; the records expire by themselves if it is not
_PART_STOP_S = 5.0
_STOPPING = "this server is stopping"
_BEGIN_S = 30.0  # for what an administrator asked for to begin: the loop may be at a check


class Daemon:
    """``run`` is its whole life."""

    def __init__(self, parts: Parts, signals: Signals, join_backoff: Backoff = JOIN_BACKOFF) -> None:
        self._parts = parts
        self._signals = signals
        self._join_backoff = join_backoff
        self._failed_rounds = 0
        self._left: tuple[BlockSpan, str] | None = None
        self._mover = Mover(parts)
        self._is_moving = False
        self.move_problem = ""  # why the last move came to nothing
        self._hold = Hold()
        self._own_drain: Drain | None = None
        self.span: BlockSpan | None = None
        self.last_move: Move | None = None
        self.lifecycle = Lifecycle()
        self.lifecycle.subscribe(
            lambda old, new: log.info("state", old=old.value, new=new.value, reason=self.lifecycle.reason)
        )

    async def run(self) -> None:
        """Serve until a stop is asked for; raises what made serving impossible, after leaving the swarm."""
        serving = asyncio.create_task(self._serve(), name="serve")
        stop = asyncio.create_task(self._signals.stop.wait(), name="stop")
        loss = asyncio.create_task(self._parts.engine.until_lost(), name="device-loss")
        tasks = (loss, serving, stop)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            failure = next((one for one in results if isinstance(one, Exception)), None)
            failure = device_loss(failure) or failure  # wherever it was noticed
            await self._stop(failure)
        if failure is not None:
            raise failure

    @property
    def takes_sessions(self) -> bool:
        """Whether a new session finds blocks here, of those that stay while the daemon moves."""
        return self.lifecycle.accepts_sessions or (self._is_moving and self._mover.takes_sessions)

    @property
    def drain(self) -> Drain | None:
        """Of the daemon, or of the blocks that a move leaves; the last one, also when it is over."""
        return self._own_drain or self._mover.drain

    # What an administrator asks for

    async def hold(self, deadline_s: float | None) -> None:
        """Drain, and serve nobody until ``release``; returns when new sessions are refused and OFFLINE announced.

        While draining already, a given deadline replaces the one before. Conflict unless there is something to
        drain; DeadlineExceeded when it has not begun in time.
        """
        if self.lifecycle.state is DaemonState.ONLINE:
            self._hold.deadline_s = deadline_s
            self._hold.asked.set()
        elif self.lifecycle.state not in (DaemonState.DRAINING, DaemonState.DRAINED):
            raise Conflict(
                f"the daemon is {self.lifecycle.state.value}: there is nothing to drain",
                hint="wait until it is online, or stop it",
            )
        elif self._own_drain is not None and deadline_s is not None:
            self._own_drain.set_deadline(deadline_s)
        await self._within(self._hold.begun.wait(), "draining")

    async def release(self) -> None:
        """Serve again after ``hold``; returns when that is announced. Conflict when nothing is held."""
        state = self.lifecycle.state
        if state is DaemonState.ONLINE and not self._hold.asked.is_set():
            return
        if not self._hold.asked.is_set() or self._signals.stop.is_set():
            raise Conflict(f"the daemon is {state.value}: there is nothing to resume")
        online = self.lifecycle.until(DaemonState.ONLINE)
        self._hold.resumed.set()
        await self._within(online, "resuming")

    async def move_to(self, span: BlockSpan | None, reason: str) -> None:
        """Leave for ``span``, or for the best one; returns when leaving has begun. Conflict unless ONLINE."""
        if self.lifecycle.state is not DaemonState.ONLINE:
            raise cannot_move(self.lifecycle.state, self._parts.instance)
        leaving = self.lifecycle.until(DaemonState.REBALANCING)
        self._parts.supervisor.leave(Departure(Cause.REQUESTED, reason, span))
        await self._within(leaving, "moving")

    async def _within(self, wait: Awaitable[object], what: str) -> None:
        try:
            async with asyncio.timeout(_BEGIN_S):
                await wait
        except TimeoutError:
            raise did_not_begin(what, _BEGIN_S, self._parts.instance) from None

    # The rounds

    async def _serve(self) -> None:
        """One round per span: choose, load, serve, watch, leave."""
        await self._start()
        while True:
            try:
                span = await self._choose()
                span = await self._take(span)
                self._failed_rounds = 0
                departure = await self._serve_on(span)
            except torch.OutOfMemoryError as error:
                departure = self._parts.limit.lower(span, error)
            except (SwarmError, DeadlineExceeded) as error:
                departure = self._failed_round(Cause.MEMBER_BROKEN, error)
            except EngineError as error:
                departure = self._failed_round(Cause.ENGINE_BROKEN, error)
            await self._leave(departure)

    async def _start(self) -> None:
        self._parts.activity.at("measuring how fast this machine is")
        await self._parts.prepare()
        await self._parts.engine.start()
        await join(self._parts, self._join_backoff)

    async def _choose(self) -> BlockSpan:
        self._parts.activity.at("choosing blocks")
        delay_s = self._parts.settings.config.blocks.join_delay_s
        return await self._parts.rebalancer.choose(self._parts.demand(), delay_s)

    async def _serve_on(self, span: BlockSpan) -> Departure:
        """Watch, and move as often as there is reason to; why the span must be given up altogether."""
        while True:
            departure = await self._until_departure(span)
            if departure.is_broken or not self._parts.has_pages(self._parts.demand().num_blocks):
                return departure
            span = await self._move(span, departure)

    async def _move(self, old: BlockSpan, departure: Departure) -> BlockSpan:
        """Go where we are needed, blocks that stay serving on; the span that is served then, whole."""
        self.move_problem = ""
        self.lifecycle.move(DaemonState.REBALANCING, departure.reason)
        self._is_moving = True
        span = await self._target(old, departure)
        if span == old:
            log.info("placement_unchanged", span=str(span))
        else:
            span = await self._change_span(Route(old, span), departure)
        self._is_moving = False
        self.lifecycle.move(DaemonState.ONLINE)
        return span

    async def _target(self, old: BlockSpan, departure: Departure) -> BlockSpan:
        """Where to go: the departure's target if it fits the configuration still; ``old`` when nobody knows."""
        demand, target = self._parts.demand(), departure.target
        if target is not None and demand.allows(target):
            return target
        try:
            return await self._parts.rebalancer.target(demand)
        except (SwarmError, DeadlineExceeded) as error:
            self.move_problem = f"the directory cannot be read: {error}"
            log.warning("check_failed", span=str(old), **error_fields(error))
            return old

    async def _change_span(self, route: Route, departure: Departure) -> BlockSpan:
        """What is served then: the new span, or what a failed move left."""
        self._parts.metrics.counter("rebalances_total").labels(departure.cause.value).inc()
        try:
            await while_member_lives(self._parts.member, self._mover.move(route))
        except MoveFailed as error:
            self.move_problem = error.message
            self._parts.board.set("move_failed", error.message)
            self._parts.supervisor.stay_a_while()
            self.span = error.served
            return error.served
        self.span, self._left = route.new, (route.old, departure.reason)
        self._note_move(route.new)
        self._parts.board.clear("move_failed")
        return route.new

    async def _until_departure(self, span: BlockSpan) -> Departure:
        """Watch the span; while a drain holds the daemon, there is nothing to watch or to move."""
        while True:
            watching = asyncio.create_task(
                self._parts.supervisor.until_departure(span, self._parts.has_pages), name="supervisor"
            )
            held = asyncio.create_task(self._hold.asked.wait())
            try:
                await asyncio.wait({watching, held}, return_when=asyncio.FIRST_COMPLETED)
                if watching.done():
                    return watching.result()
            finally:
                for task in (watching, held):
                    task.cancel()
                await asyncio.gather(watching, held, return_exceptions=True)
            await self._stay_drained(span)

    async def _stay_drained(self, span: BlockSpan) -> None:
        """Drain, then wait for the resume; ONLINE again as it was."""
        hold = self._hold
        await self._begin_drain("asked for over the control socket", "this server is draining")
        left = await self._drain(hold.deadline_s, hold.resumed)
        if not hold.resumed.is_set():
            if left:
                self._abandon(left, was_cut_short=False)
            self.lifecycle.move(DaemonState.DRAINED)
            log.info("drained", abandoned=left)
        await hold.resumed.wait()
        self._hold, self._own_drain = Hold(), None
        await self._go_online(span)

    async def _take(self, span: BlockSpan) -> BlockSpan:
        """Announce, load, prove and serve ``span``, or what is left to us where others have chosen the same.

        ONLINE is announced when it is true and not before; of the first blocks while the others are loaded.
        """
        parts = self._parts
        self.lifecycle.move(DaemonState.LOADING, f"{len(span)} blocks")
        self.span = span
        self.span = span = await claim(parts, span)
        self.span = span = await while_member_lives(parts.member, Arrival(parts, span).run())
        await self._go_online(span)
        parts.board.clear("engine_failed", "p2pd_failed", "join_failed")
        self._note_move(span)
        return span

    async def _go_online(self, span: BlockSpan) -> None:
        member = self._parts.member
        member.admit()
        await member.announce(ServerState.ONLINE, span)
        self.lifecycle.move(DaemonState.ONLINE)
        log.info("online", span=str(span), peer_id=member.peer_id, maddrs=await member.maddrs())

    def _note_move(self, span: BlockSpan) -> None:
        left, self._left = self._left, None
        if left is not None and left[0] != span:
            self.last_move = Move(time.time(), left[0], span, left[1])
            self._parts.metrics.counter("moves_total").inc()
            log.info("moved", old=str(left[0]), new=str(span), reason=left[1])

    async def _leave(self, departure: Departure) -> None:
        """OFFLINE first, then no new sessions, then end those that are here; broken parts are made anew."""
        self._is_moving = False
        if departure.cause is Cause.MEMBER_BROKEN:
            self._parts.board.set("p2pd_failed", departure.reason)
        if departure.cause is Cause.ENGINE_BROKEN:
            self._parts.board.set("engine_failed", departure.reason)
        if self.span is not None and self._left is None:
            self._left = (self.span, departure.reason)
        self._parts.metrics.counter("rebalances_total").labels(departure.cause.value).inc()
        log.info("leaving", span=str(self.span), cause=departure.cause.value, reason=departure.reason)
        if self.lifecycle.can_move(DaemonState.REBALANCING):
            self.lifecycle.move(DaemonState.REBALANCING, departure.reason)
        if departure.cause is not Cause.MEMBER_BROKEN:
            await self._announce_offline()
        self._parts.member.refuse("this server moves to other blocks")
        if not departure.is_broken and (left := await self._drain(None, asyncio.Event())):
            self._abandon(left, was_cut_short=False)
        self._own_drain = None
        await self._drop_span(f"the server gives up these blocks: {departure.reason}")
        if departure.cause is Cause.ENGINE_BROKEN:
            await self._parts.engine.stop(_PART_STOP_S)
            await self._parts.engine.start()
        if departure.cause is Cause.MEMBER_BROKEN:
            await self._parts.member.stop()
            await join(self._parts, self._join_backoff)
            await self._announce_offline()
        self.span = None

    async def _stop(self, failure: BaseException | None) -> None:
        """Say goodbye, let sessions finish, take the parts down from the outside in."""
        parts, state = self._parts, self.lifecycle.state
        is_loading = state is DaemonState.LOADING and parts.engine.span is not None
        is_serving = state is DaemonState.ONLINE or is_loading or self._is_moving
        if is_serving and failure is None:
            await self._begin_drain("stop requested", _STOPPING)
        else:
            await self._announce_offline()
            parts.member.refuse(_STOPPING)
        if self.lifecycle.state is DaemonState.DRAINING:
            left_s = None if self._own_drain is None else self._own_drain.deadline_left_s
            if left := await self._drain(left_s, self._signals.now):
                self._abandon(left, was_cut_short=self._signals.now.is_set())
            else:
                self.lifecycle.move(DaemonState.DRAINED)
                log.info("drained", abandoned=0)
        self.lifecycle.move(
            DaemonState.STOPPING if failure is None else DaemonState.FAILED, str(failure or "")
        )
        await self._drop_span("the server is stopping")
        await parts.member.stop()
        await parts.engine.stop(_PART_STOP_S)
        parts.loader.drop_outside(None)
        if failure is None:
            self.lifecycle.move(DaemonState.STOPPED)

    async def _begin_drain(self, reason: str, refusal: str) -> None:
        """OFFLINE first, then no new sessions; running ones go on."""
        self.lifecycle.move(DaemonState.DRAINING, reason)
        log.info("drain_started", reason=reason)
        self._parts.metrics.counter("drains_total").inc()
        await self._announce_offline()
        self._parts.member.refuse(refusal)
        self._hold.begun.set()

    async def _drain(self, deadline_s: float | None, cut_short: asyncio.Event) -> int:
        """Let sessions finish, in the configured time unless another one is given; how many are left."""
        if deadline_s is None:
            deadline_s = self._parts.settings.config.daemon.drain_deadline_s
        self._own_drain = Drain(self._parts.engine, self._parts.member, deadline_s)
        return await self._own_drain.wait(cut_short)

    def _abandon(self, left: int, *, was_cut_short: bool) -> None:
        """Tell the clients that are left why they do not finish."""
        log.warning("drain_abandoned", sessions_and_passes=left, was_cut_short=was_cut_short)
        self._parts.metrics.counter("drain_abandoned_total").inc(left)
        why = (
            "the server was told to stop at once"
            if was_cut_short
            else "the server's drain reached its deadline"
        )
        self._parts.engine.end_work(why)

    async def _announce_offline(self) -> None:
        """As well as the swarm allows: leaving must not hang on a swarm that is gone."""
        if self.span is None:
            return
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self._parts.member.announce(ServerState.OFFLINE, self.span)
        except (SwarmError, DeadlineExceeded, TimeoutError) as error:
            log.warning("offline_not_stored", span=str(self.span), **error_fields(error))

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
