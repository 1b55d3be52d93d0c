"""Where to serve: reads the directory and asks the placement rule. The rule itself is ``swarm.placement``."""

from __future__ import annotations

import asyncio
import random

import structlog

from petalsd.daemon.parts import SwarmMember
from petalsd.daemon.plan import Demand
from petalsd.swarm.directory import SwarmView
from petalsd.swarm.placement import choose_span, should_move
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)


class Rebalancer:
    """``rng`` spreads servers in time and breaks the symmetry of the simulation in the moving rule."""

    def __init__(self, member: SwarmMember, rng: random.Random) -> None:
        self._member = member
        self._rng = rng

    async def choose(self, demand: Demand, join_delay_s: float) -> BlockSpan:
        """The span to serve next. Waits Uniform(0, 2 * join_delay_s) first when there is a choice.

        Records that an earlier life of ours left behind are declared OFFLINE: readers would merge them with the
        new ones into one wrong span. SwarmError or DeadlineExceeded when the directory cannot be read.
        """
        if demand.pinned is None:
            await asyncio.sleep(self._rng.uniform(0.0, 2.0 * join_delay_s))
        view = await self._member.read_live_view()
        await self._retract_old_records(view)
        return self._best(view, demand)

    async def target(self, demand: Demand) -> BlockSpan:
        """The span to move to: as ``choose``, but at once, and what is announced stays."""
        return demand.pinned or self._best(await self._member.read_view(), demand)

    def should_move(self, view: SwarmView, balance_quality: float) -> bool:
        """The rule of protocol.md 6.3 over the spans that are served or being loaded; ours must be among them."""
        spans = view.spans(ServerState.JOINING)
        return should_move(spans, self._member.peer_id, view.num_blocks, balance_quality, self._rng)

    def _best(self, view: SwarmView, demand: Demand) -> BlockSpan:
        if demand.pinned is not None:
            return demand.pinned
        others = view.without({self._member.peer_id}).spans(ServerState.JOINING)
        return choose_span(others, view.num_blocks, demand.num_blocks)

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
