"""What a session of a part of the span is charged, and how often page tables are made."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from petalsd.engine.step import Step
from petalsd.kvcache.pool import KVPool
from petalsd.types import BlockSpan
from tests.engine.rig import PAGE_TOKENS, Gate, TinyModel, opened, serving, states, with_hook


async def test_a_part_of_the_span_is_charged_for_its_own_blocks(llama: TinyModel) -> None:
    """A session of one block of four reserves and holds a quarter of what one of the whole span does."""
    async with serving(llama) as engine:
        pages = []
        for span in (BlockSpan(2, 3), llama.span):
            async with opened(engine, span, batch=2, max_tokens=5 * PAGE_TOKENS) as session:
                await session.step(Step(states(2, 2 * PAGE_TOKENS + 1), 0))
                stats = engine.pool.stats()
                pages.append((stats.pages_reserved, stats.pages_mapped))
                assert session.info().pages == stats.pages_mapped
    assert pages == [(2 * 5, 2 * 3), (4 * 2 * 5, 4 * 2 * 3)]


async def test_one_table_serves_all_blocks_of_a_batch(
    llama: TinyModel, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions of different parts of the span in one batch: its page tables are looked up once."""
    tables: list[int] = []
    fill = KVPool.fill_origins

    def counted(pool: KVPool, sessions: list, out: np.ndarray) -> int:
        tables.append(len(sessions))
        return fill(pool, sessions, out)

    monkeypatch.setattr(KVPool, "fill_origins", counted)
    async with (
        serving(llama, blocks=with_hook(llama, 3, gate)) as engine,
        opened(engine, BlockSpan(3, 4)) as holder,
        opened(engine, BlockSpan(0, 2)) as one,
        opened(engine, BlockSpan(1, 3)) as two,
        opened(engine, BlockSpan(0, 3)) as three,
    ):
        held = asyncio.create_task(holder.step(Step(states(1, 1), 0)))
        await gate.wait_until_reached()
        steps = [asyncio.create_task(session.step(Step(states(1, 6), 0))) for session in (one, two, three)]
        await asyncio.sleep(0)  # each hands its step in
        gate.opened.set()
        await asyncio.gather(held, *steps)
    assert tables == [1, 3]
