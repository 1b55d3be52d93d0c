"""How many pages the attention cache gets, where captured graphs take a part of the device's memory."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from petalsd.daemon.memory import free_memory_bytes
from petalsd.daemon.plan import ServingPlan
from petalsd.engine.engine import Engine
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.sizing import pages_for, tokens_for
from petalsd.models.contract import Block

log = structlog.get_logger(__name__)

_TRIAL_PAGES = 2  # the one that is never used, and one


async def cache_pages(plan: ServingPlan, engine: Engine, blocks: Mapping[int, Block], num_blocks: int) -> int:
    """Pages of the pool for ``num_blocks`` blocks, of which ``blocks`` are loaded, page 0 included: the plan's, as
    far as what is free after a trial capture, and the other blocks, leave room. Errors as of
    ``Engine.measure_graphs``."""
    planned = pages_for(plan.kv_tokens, num_blocks, plan.geometry.page_tokens)
    if not plan.has_graphs:
        return planned
    trial = KVPool(plan.geometry, _TRIAL_PAGES, plan.dtype, plan.device)
    trial.allocate()
    graph_bytes = await engine.measure_graphs(blocks, trial)
    missing_bytes = (num_blocks - len(blocks)) * (plan.block_weights_bytes + plan.need.graphs.block_bytes)
    room_bytes = free_memory_bytes(plan.device) - graph_bytes - missing_bytes
    kv_tokens = cache_tokens(plan, num_blocks, room_bytes)
    log.info("graphs_measured", bytes=graph_bytes, kv_tokens=kv_tokens, planned_kv_tokens=plan.kv_tokens)
    return pages_for(kv_tokens, num_blocks, plan.geometry.page_tokens)


def cache_tokens(plan: ServingPlan, num_blocks: int, room_bytes: int) -> int:
    """Tokens of cache per block in ``room_bytes`` beside what passes need; enough for the longest session."""
    fitting = tokens_for(room_bytes - plan.need.reserve_bytes, num_blocks, plan.geometry)
    return min(plan.kv_tokens, max(fitting, plan.limits.max_session_tokens))
