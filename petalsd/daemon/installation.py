"""Gives loaded blocks to the engine: with a cache of their own, or in the place of others while sessions go on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from petalsd.daemon.cache_room import cache_pages
from petalsd.daemon.plan import Demand, ServingPlan
from petalsd.engine.engine import Engine
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.sizing import pages_for
from petalsd.models.contract import Angles, Block

# The pool of so many pages for so many blocks, whose memory is not taken yet.
MakePool = Callable[[int, int], KVPool]


class Installation:
    """``measure`` finds out how fast the installed blocks are; ``demand`` says how many more may come."""

    def __init__(
        self,
        plan: ServingPlan,
        engine: Engine,
        angles: Angles,
        make_pool: MakePool,
        measure: Callable[[Engine], Awaitable[None]],
        demand: Callable[[], Demand],
    ) -> None:
        self._plan = plan
        self._engine = engine
        self._angles = angles
        self._make_pool = make_pool
        self._measure = measure
        self._demand = demand
        self._num_cached = 0  # blocks that the cache was made for

    async def install(self, blocks: Mapping[int, Block], num_planned: int) -> None:
        """With a fresh KV pool, instead of what was served. Errors as of ``Engine.load_span`` and of memory.

        The pool is made for ``num_planned`` blocks, of which some may be loaded later, and where placement may
        leave blocks to others, for all that may come back: sessions have more of it until then.
        """
        demand = self._demand()
        num_cached = max(num_planned, demand.num_blocks if demand.may_be_fewer else 0)
        pool = self._make_pool(await cache_pages(self._plan, self._engine, blocks, num_cached), num_cached)
        pool.allocate()
        await self._engine.load_span(blocks, pool, self._angles)
        self._num_cached = num_cached
        await self._measure(self._engine)

    async def exchange(self, blocks: Mapping[int, Block]) -> None:
        """Over the pool that there is; errors as of ``Engine.change_span``."""
        await self._engine.change_span(blocks)

    def has_pages(self, num_blocks: int) -> bool:
        """Whether the pool does for so many blocks.

        Making another one ends all sessions. So while there is any, one that holds less than the plan says does,
        as long as the longest session fits into it.
        """
        if num_blocks <= self._num_cached:
            return True
        pool, plan = self._engine.pool, self._plan
        if pool is None or not self._engine.work_outside(None):
            return False
        longest = pages_for(plan.limits.max_session_tokens, num_blocks, plan.geometry.page_tokens)
        return longest <= pool.num_pages
