"""Taking a span where none is served: loaded block by block, and served from the first ones on."""

from __future__ import annotations

import structlog
import torch

from petalsd.daemon.components import Parts
from petalsd.daemon.health import engine_problem
from petalsd.daemon.loaded_blocks import HINDRANCES, announce_change, joining, serve_blocks
from petalsd.device_faults import raise_if_lost
from petalsd.errors import EngineError
from petalsd.log import error_fields
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)


class Arrival:
    """One span, announced as JOINING before. ``run`` once."""

    def __init__(self, parts: Parts, goal: BlockSpan) -> None:
        self._parts = parts
        self._goal = goal
        self._online: BlockSpan | None = None  # of the goal, and announced

    async def run(self) -> BlockSpan:
        """Load, prove and serve; what is to be announced as ONLINE in the end.

        That is all of the span, or the blocks that were online when the others could not be had. When there were
        none, the error is raised.
        """
        parts, goal = self._parts, self._goal
        parts.loader.drop_outside(goal)
        try:
            await parts.loader.load(parts.rebalancer.loading_order(goal, None), self._show)
            await self._serve(goal)
        except HINDRANCES as error:
            raise_if_lost(error)
            if self._online is None:
                raise
            return self._settle(self._online, error)
        parts.board.clear("load_failed")
        return goal

    async def _show(self, part: BlockSpan) -> None:
        """The first blocks, or some more; sessions that are here by now notice nothing."""
        await self._serve(part)
        self._parts.member.admit()
        await announce_change(self._parts, joining(self._goal, part), self._goal)
        self._online = part
        log.info("part_online", span=str(part), goal=str(self._goal), blocks=len(part), of=len(self._goal))

    async def _serve(self, span: BlockSpan) -> None:
        self._parts.activity.at("testing the blocks")
        await serve_blocks(self._parts, span, len(self._goal))
        if problem := await engine_problem(self._parts.engine):
            raise EngineError(problem)

    def _settle(self, online: BlockSpan, error: Exception) -> BlockSpan:
        """Better some blocks than none: the others are tried again by a move, in some checks' time."""
        parts, goal = self._parts, self._goal
        log.warning("span_incomplete", span=str(goal), served=str(online), **error_fields(error))
        if isinstance(error, torch.OutOfMemoryError):
            parts.limit.lower(goal, error, len(online))
        else:
            parts.board.blame("load_failed", error, f"blocks {online} of {goal} are served")
        parts.loader.drop_outside(online)
        parts.supervisor.stay_a_while()
        return online
