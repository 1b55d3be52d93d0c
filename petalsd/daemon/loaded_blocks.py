"""Loaded blocks on their way to clients: given to the engine, and told to the swarm."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from petalsd.daemon.components import Parts
from petalsd.errors import DeadlineExceeded, EngineError, ModelError, SwarmError
from petalsd.log import error_fields
from petalsd.swarm.announcer import Part
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

# What keeps blocks from being served while the engine is sound; RuntimeError is how torch runs out of memory.
HINDRANCES = (ModelError, OSError, MemoryError, RuntimeError)


async def serve_blocks(parts: Parts, span: BlockSpan, num_planned: int) -> None:
    """Serve blocks that are loaded instead of those before; sessions on those that stay go on.

    Where none are served yet, the cache is made for ``num_planned`` blocks. EngineError when the engine does not
    take them, errors of memory as they come.
    """
    blocks = {index: parts.loader.blocks[index] for index in span}
    try:
        if parts.engine.span is None:
            await parts.install(blocks, num_planned)
        else:
            await parts.exchange(blocks)
    except DeadlineExceeded as error:  # the engine's, where others are the swarm's
        raise EngineError(error.message) from error


async def announce_change(parts: Parts, told: Sequence[Part], goal: BlockSpan | None = None) -> None:
    """A directory that does not take it is no reason to end anything: it is told again with each renewal."""
    try:
        await parts.member.announce_parts(told, goal)
    except (SwarmError, DeadlineExceeded) as error:
        log.warning("change_not_announced", **error_fields(error))


def joining(goal: BlockSpan, served: BlockSpan) -> list[Part]:
    """What is said of ``goal`` while only ``served`` is online: the claim first, what is served last."""
    return [
        *((ServerState.JOINING, span) for span in goal.minus(served)),
        (ServerState.ONLINE, served),
    ]
