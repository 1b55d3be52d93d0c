"""Watches a span that is served: health of the parts, our own record, and whether another place is better."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from petalsd.config import BlocksSection
from petalsd.daemon.health import engine_problem
from petalsd.daemon.parts import ServingEngine, SwarmMember
from petalsd.daemon.plan import Demand
from petalsd.daemon.presence import presence_problem
from petalsd.daemon.rebalancer import Rebalancer
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import DeadlineExceeded, SwarmError
from petalsd.log import error_fields
from petalsd.swarm.directory import SwarmView
from petalsd.swarm.placement.decision import OwnSpan
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)


# A libp2p daemon that hangs is noticed within this and the deadline of its check.
HEALTH_PERIOD_S = 5.0
_CALM_PERIODS = 10
_MAX_CHECK_SHARE = 0.02  # of one core: in a swarm of thousands reading what they announce takes a second


class Cause(enum.Enum):
    """Why a span is left."""

    BALANCE = "balance"
    REQUESTED = "requested"
    RECONFIGURED = "reconfigured"
    ENGINE_BROKEN = "engine_broken"
    MEMBER_BROKEN = "member_broken"
    OUT_OF_MEMORY = "out_of_memory"


@dataclass(frozen=True, slots=True)
class Departure:
    """``target``: where to go, None where that is to be chosen anew."""

    cause: Cause
    reason: str
    target: BlockSpan | None = None

    @property
    def is_broken(self) -> bool:
        """Whether a part of ours must be made anew."""
        return self.cause in (Cause.ENGINE_BROKEN, Cause.MEMBER_BROKEN)


class Supervisor:
    """``blocks`` gives the section in force, ``demand`` what it asks for."""

    def __init__(
        self,
        engine: ServingEngine,
        member: SwarmMember,
        rebalancer: Rebalancer,
        blocks: Callable[[], BlocksSection],
        demand: Callable[[], Demand],
        rng: random.Random,
        board: WarningBoard,
    ) -> None:
        self._engine = engine
        self._member = member
        self._rebalancer = rebalancer
        self._blocks = blocks
        self._demand = demand
        self._rng = rng
        self._board = board
        self._check_now = asyncio.Event()
        self._wanted: Departure | None = None
        self._stay_until_s = 0.0
        self._served_since = 0.0
        self._check_cost_s = 0.0
        self.next_check_monotonic_s: float | None = None

    def check_now(self) -> None:
        """Do the next check at once, and say in the log what came of it."""
        self._stay_until_s = 0.0
        self._check_now.set()

    def stay_a_while(self) -> None:
        """A move has failed: look for reasons to move only after some checks, or when somebody asks for one."""
        self._stay_until_s = time.monotonic() + _CALM_PERIODS * self._blocks().balance_period_s

    def leave(self, departure: Departure) -> None:
        """Leave the span that is served, at once, for this reason."""
        self._wanted = departure
        self._check_now.set()

    async def until_departure(self, span: BlockSpan, has_pages: Callable[[int], bool]) -> Departure:
        """Look at the libp2p daemon often and at the rest at random intervals, until there is a reason to go.

        ``has_pages``: whether the cache does for so many blocks, as things are.
        """
        self._served_since = time.monotonic()
        failure = asyncio.create_task(self._member.until_failed(), name="member-failure")
        try:
            while True:
                self._plan_check()
                problem = await self._until_check(failure)
                if problem is not None:
                    return Departure(Cause.MEMBER_BROKEN, problem)
                was_asked = self._check_now.is_set()
                self._check_now.clear()
                departure = self._wanted or await self._check(span, has_pages)
                if departure is not None:
                    return departure
                if was_asked:
                    log.info("placement_unchanged", span=str(span))
        finally:
            failure.cancel()
            self._wanted = None  # obeyed, or overtaken by another reason to go
            self.next_check_monotonic_s = None

    def _plan_check(self) -> None:
        """At random, so that servers that were started together do not act together."""
        period_s = max(self._blocks().balance_period_s, self._check_cost_s / _MAX_CHECK_SHARE)
        wait_s = self._rng.uniform(0.0, 2.0 * period_s)
        self.next_check_monotonic_s = time.monotonic() + wait_s

    async def _until_check(self, failure: asyncio.Task[str]) -> str | None:
        """Until the planned time has come or somebody asked: None. What is wrong with a member that breaks."""
        asked = asyncio.create_task(self._check_now.wait())
        try:
            while (problem := await self._broken_member(failure)) is None and not asked.done():
                left_s = (self.next_check_monotonic_s or 0.0) - time.monotonic()
                if left_s <= 0:
                    break
                pause_s = min(left_s, HEALTH_PERIOD_S)
                await asyncio.wait({asked, failure}, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
        return problem

    async def _broken_member(self, failure: asyncio.Task[str]) -> str | None:
        return failure.result() if failure.done() else await presence_problem(self._member)

    async def _check(self, span: BlockSpan, has_pages: Callable[[int], bool]) -> Departure | None:
        problem = await engine_problem(self._engine)
        if problem is not None:
            return Departure(Cause.ENGINE_BROKEN, problem)
        demand, may_move = self._demand(), time.monotonic() >= self._stay_until_s
        if may_move and not demand.allows(span):
            return Departure(Cause.RECONFIGURED, f"the configuration asks for {demand}")
        if may_move and not has_pages(len(span)):
            return Departure(
                Cause.RECONFIGURED, "the cache was made for fewer blocks, and nobody uses it now"
            )
        try:
            view = await self._member.read_live_view()
            is_complete = await self._restore_record(span, view)
        except (SwarmError, DeadlineExceeded) as error:
            log.warning("check_failed", span=str(span), **error_fields(error))
            return None
        is_free = is_complete and may_move and demand.pinned is None
        return self._judge(span, view, demand) if is_free else None

    def _judge(self, span: BlockSpan, view: SwarmView, demand: Demand) -> Departure | None:
        """Ask the placement rule."""
        own = OwnSpan(self._member.peer_id, span, time.monotonic() - self._served_since)
        began_s = time.thread_time()
        decision = self._rebalancer.check(view, own, self._blocks().balance_quality, demand)
        self._check_cost_s = time.thread_time() - began_s
        if not decision.is_move:
            return None
        what = "other blocks" if len(decision.target) == len(span) else "another number of blocks"
        return Departure(Cause.BALANCE, f"the swarm is served better from {what}", decision.target)

    async def _restore_record(self, span: BlockSpan, view: SwarmView) -> bool:
        """Announce again what got lost (others restart, clocks differ); whether ``view`` had all of it."""
        peer = self._member.peer_id
        missing = [index for index in span if not _is_online(view, index, peer)]
        if missing:
            log.warning("own_record_missing", blocks=missing)
            self._board.set("record_missing", f"{len(missing)} of {len(span)} blocks")
            await self._member.announce(ServerState.ONLINE, span)
        else:
            self._board.clear("record_missing")
        return not missing


def _is_online(view: SwarmView, block: int, peer: str) -> bool:
    with contextlib.suppress(KeyError, IndexError):
        return view.blocks[block][peer].state is ServerState.ONLINE
    return False
