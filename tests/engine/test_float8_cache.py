"""Keys and values in float8, served as on a GPU, on the CPU: kernels in the interpreter, graphs by a double."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from petalsd.engine.captures import Capturing
from petalsd.engine.engine import Engine
from petalsd.engine.kv_transfer import Place
from petalsd.engine.observer import NullObserver
from petalsd.engine.runners import RunnerFactory
from petalsd.engine.step import Step
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.sizing import KVGeometry, pages_for
from petalsd.kvcache.spill import SpillArea
from petalsd.ops.eight_bit_kv import FLOAT8
from petalsd.types import BlockSpan
from tests.engine.recorded_graphs import RecordedGraphs
from tests.engine.rig import CPU, PAGE_TOKENS, TinyModel, feed, opened, states
from tests.engine.test_kernel_engine import LIMITS, KernelRunners, StagedRunners
from tests.numeric import assert_close

KV_TOKENS = 64
F32 = torch.float32


@asynccontextmanager
async def serving(
    model: TinyModel, runners: RunnerFactory | None = None, spill: SpillArea | None = None
) -> AsyncIterator[Engine]:
    """All blocks of the model, with pages of NaN; by default computed by kernels."""
    geometry = KVGeometry(PAGE_TOKENS, model.config.num_kv_heads, model.config.head_dim, FLOAT8)
    num_pages = pages_for(KV_TOKENS, model.config.num_blocks, PAGE_TOKENS)
    pool = KVPool(geometry, num_pages, F32, CPU, spill=spill)
    kv = pool.allocate()
    for part in (kv.k, kv.v):
        part.fill_(torch.nan)
    engine = Engine(LIMITS, CPU, 1, None, runners or KernelRunners(CPU, 1, LIMITS, NullObserver()))
    await engine.start()
    try:
        await engine.load_span(model.blocks, pool, model.rope)
        yield engine
    finally:
        await engine.stop(deadline_s=10)


async def test_states_are_off_by_the_format_alone(tmp_path: Path) -> None:
    """Kernels compute what torch computes over the same pages; float32 is as near as 3 bits of fraction allow."""
    model = TinyModel(tmp_path, num_hidden_layers=2)
    hidden, found = states(2, 20), []
    for runners in (
        KernelRunners(CPU, 1, LIMITS, NullObserver(), Capturing(RecordedGraphs())),
        StagedRunners(CPU, 1, LIMITS, NullObserver()),
    ):
        async with serving(model, runners) as engine, opened(engine, batch=2, max_tokens=24) as session:
            found.append(await feed(session, hidden, [17, 1, 2]))
    assert_close(found[0], found[1], 1e-4, 1e-4, "kernels")
    exact = model.expected(hidden).detach()
    error = float((found[0] - exact).norm() / (exact - hidden).norm())
    assert 1e-4 < error < 0.04


@pytest.mark.nightly
async def test_a_carried_session_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """After beams, a rollback and a stay in memory and on disk: numbers of the format become themselves again."""
    model, hidden = TinyModel(tmp_path / "model", num_hidden_layers=1), states(2, 24)
    page_bytes = 2 * PAGE_TOKENS * model.config.num_kv_heads * model.config.head_dim
    spill = SpillArea(tmp_path, 1 << 20, 0, host_bytes=3 * page_bytes)  # of its 4 pages
    async with (
        serving(model, spill=spill) as first,
        serving(model) as second,
        opened(first, batch=2, max_tokens=24) as giver,
        opened(second, batch=2, max_tokens=24) as taker,
    ):
        await feed(giver, hidden[:, :20], [17, 3])
        await giver.step(Step(hidden[:, 20:21], 19, hypo_ids=(1, 1)))
        async with opened(first, max_tokens=KV_TOKENS) as greedy:
            await greedy.step(Step(states(1, KV_TOKENS), 0))
        for place in (Place(BlockSpan(0, 1), 0, 7), Place(BlockSpan(0, 1), 7, 20)):
            await taker.write_kv(place, await giver.read_kv(place))
        taker.resume_at(20)
        answers = [await feed(session, hidden[:, 21:], [1, 2]) for session in (giver, taker)]
    assert torch.equal(*answers)
    assert answers[0].isfinite().all()
