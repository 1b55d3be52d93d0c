"""Where to serve: reads the directory and asks the placement rule. The rule itself is ``swarm.placement``."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable

import structlog

from petalsd.daemon.parts import SwarmMember
from petalsd.daemon.placement_record import PlacementRecord
from petalsd.daemon.plan import Demand
from petalsd.swarm.directory import SwarmView
from petalsd.swarm.placement.claims import Review, newcomers, review
from petalsd.swarm.placement.decision import Decision, MoveCosts, OwnSpan, decide, judge
from petalsd.swarm.placement.growth import loading_order
from petalsd.swarm.placement.joining import choose_span
from petalsd.swarm.placement.lengths import read_lengths, with_lengths
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.reading import read_state, without_settling
from petalsd.swarm.placement.state import SwarmState
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)


class Rebalancer:
    """Asks the rule of ``swarm.placement`` about this server.

    ``rng`` spreads servers in time. ``throughput`` is what we announce for a number of blocks, ``load_block_s``
    what one block took to load, None before that is known. ``record`` is told of the checks.
    """

    def __init__(
        self,
        member: SwarmMember,
        rng: random.Random,
        throughput: Callable[[int], float],
        load_block_s: Callable[[], float | None],
        record: PlacementRecord,
        policy: Policy | None = None,
    ) -> None:
        self._member = member
        self._rng = rng
        self._throughput = throughput
        self._load_block_s = load_block_s
        self._record = record
        self._policy = policy or Policy()
        self._seen: SwarmState | None = None

    async def choose(self, demand: Demand, join_delay_s: float) -> BlockSpan:
        """The span to serve next. Waits Uniform(0, 2 * join_delay_s) first when there is a choice.

        Records that an earlier life of ours left behind are declared OFFLINE: readers would merge them with the
        new ones into one wrong span. SwarmError or DeadlineExceeded when the directory cannot be read.
        """
        if demand.pinned is None:
            await asyncio.sleep(self._rng.uniform(0.0, 2.0 * join_delay_s))
        view = await self._member.read_live_view()
        self._read(view)
        await self._retract_old_records(view)
        return demand.pinned or self._best(view, demand.num_blocks)

    async def target(self, demand: Demand) -> BlockSpan:
        """The span to move to: as ``choose``, but at once, and what is announced stays."""
        return demand.pinned or self._best(await self._member.read_live_view(), demand.num_blocks)

    def decide(self, view: SwarmView, own: OwnSpan, balance_quality: float, demand: Demand) -> Decision:
        """What to do now, and why. Our record must be in ``view``, else ValueError.

        A ``balance_quality`` of 0 never moves; else a move must win 1 / quality times what it costs.
        """
        state, costs = self._read(view), self._costs(balance_quality)
        decision = decide(state, own, costs, self._policy)
        if not demand.may_be_fewer:
            return decision
        return with_lengths(decision, state, read_lengths(view, state), own, costs, self._policy)

    def check(self, view: SwarmView, own: OwnSpan, balance_quality: float, demand: Demand) -> Decision:
        """``decide`` for the daemon itself, which leaves a trace and, if it moves, is held to it."""
        decision = self.decide(view, own, balance_quality, demand)
        self._record.checked(decision)
        return decision

    def judge(self, view: SwarmView, own: OwnSpan, target: BlockSpan) -> Decision:
        """The decision to move to ``target`` because somebody asked for it. ValueError as for ``decide``."""
        costs, rate = self._costs(1.0), self._throughput(len(target))
        return judge(self._read(view), own, target, costs, self._policy, rate)

    def review(self, view: SwarmView) -> Review:
        """What our claim of blocks that we are about to load is worth beside others'. ValueError as ``decide``."""
        return review(self._read(view), newcomers(view), self._member.peer_id, self._policy)

    def loading_order(self, goal: BlockSpan, served: BlockSpan | None) -> list[int]:
        """All blocks of ``goal``, those of ``served`` first: by what the directory said when it was read last."""
        if self._seen is None:
            return list(goal)
        return loading_order(self._seen, self._member.peer_id, goal, served, self._policy)

    def _read(self, view: SwarmView) -> SwarmState:
        came_after = time.time() - self._policy.min_stay_s
        self._seen = without_settling(read_state(view), view, came_after, self._member.peer_id)
        return self._seen

    def _costs(self, balance_quality: float) -> MoveCosts:
        margin = 1 / balance_quality if balance_quality else math.inf
        return MoveCosts(load_block_s=self._load_block_s(), margin=margin)

    def _best(self, view: SwarmView, num_blocks: int) -> BlockSpan:
        state = self._read(view).without(self._member.peer_id)
        return choose_span(state, num_blocks, self._throughput(num_blocks), self._policy)

    async def _retract_old_records(self, view: SwarmView) -> None:
        peer = self._member.peer_id
        old = [
            block
            for block, records in enumerate(view.blocks)
            if peer in records and records[peer].state is not ServerState.OFFLINE
        ]
        if old:
            log.info("old_records_retracted", blocks=old)
            await self._member.announce(ServerState.OFFLINE, BlockSpan(old[0], old[-1] + 1))
