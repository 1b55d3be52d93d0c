"""Blocks and their cache, as a real engine takes them over: when the cache does for more blocks, and when not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from petalsd.config_loading import load_config
from petalsd.daemon.installation import Installation
from petalsd.daemon.plan import Demand, ServingPlan, make_plan
from petalsd.engine.engine import Engine
from petalsd.engine.step import SessionSpec, Step
from petalsd.kvcache.pool import KVPool
from petalsd.paths import InstancePaths
from petalsd.types import BlockSpan
from tests.engine.rig import CPU, TinyModel, states

TWO, FOUR = BlockSpan(0, 2), BlockSpan(0, 4)


@dataclass
class Rig:
    """An engine without a span, and what gives it one; the plan has 64 tokens of cache for each block."""

    model: TinyModel
    plan: ServingPlan
    engine: Engine
    demand: Demand
    max_session_tokens: int = 32

    def installation(self) -> Installation:
        def make_pool(num_pages: int, num_blocks: int) -> KVPool:
            return KVPool(self.plan.geometry, num_pages, torch.float32, CPU)

        async def measure(engine: Engine) -> None:
            """Nobody asks how fast it is."""

        return Installation(self.plan, self.engine, self.model.rope, make_pool, measure, lambda: self.demand)

    def blocks(self, span: BlockSpan) -> dict[int, object]:
        return {index: self.model.blocks[index] for index in span}


@pytest.fixture(params=[32, 64])
async def rig(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    model, longest = TinyModel(tmp_path), request.param
    overrides = [
        f"model.source={tmp_path}", "engine.device=cpu", "model.dtype=float32", "engine.kv_tokens=64",
        f"engine.max_session_tokens={longest}", "engine.page_tokens=16",
    ]  # fmt: skip
    plan = make_plan(load_config(None, {}, overrides).config, InstancePaths("t", tmp_path, tmp_path))
    engine = Engine(plan.limits, CPU, num_threads=1)
    await engine.start()
    yield Rig(model, plan, engine, Demand(2, None), longest)
    await engine.stop(deadline_s=10)


async def test_a_cache_that_is_used_does_for_more_blocks_than_it_was_made_for(rig: Rig) -> None:
    """A session on blocks that stay goes on, if the longest one fits still; with nobody there it is made anew."""
    installation = rig.installation()
    await installation.install(rig.blocks(TWO), 2)
    assert [installation.has_pages(count) for count in (2, 3)] == [True, False]
    session = await rig.engine.open_session(SessionSpec(TWO, 1, 32, "peer"))
    hidden = states(1, 20)
    parts = [await session.step(Step(hidden[:, :10], 0))]
    assert installation.has_pages(4) is (rig.max_session_tokens == 32)
    await installation.exchange(rig.blocks(FOUR))
    parts.append(await session.step(Step(hidden[:, 10:], 10)))
    torch.testing.assert_close(torch.cat(parts, 1), rig.model.expected(hidden, TWO), atol=1e-4, rtol=1e-4)
    await rig.engine.self_test()
    await session.close()
    assert not installation.has_pages(4)
    await installation.install(rig.blocks(FOUR), 4)
    assert rig.engine.pool is not None and rig.engine.pool.stats().pages_total == 4 * 64 // 16
    assert installation.has_pages(4)


async def test_the_cache_is_made_for_all_blocks_that_may_come_back(rig: Rig) -> None:
    """Whoever gave blocks up takes them back beside the sessions that there are; these have more until then."""
    rig.demand = Demand(4, None, may_be_fewer=True)
    installation = rig.installation()
    await installation.install(rig.blocks(TWO), 2)
    assert rig.engine.pool is not None and rig.engine.pool.stats().pages_total == 4 * 64 // 16
    assert [installation.has_pages(count) for count in (4, 5)] == [True, False]
