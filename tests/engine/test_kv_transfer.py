"""Sessions whose keys and values go from one engine's pages to another's, and go on there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from petalsd.engine.handle import Session
from petalsd.engine.kv_transfer import Place
from petalsd.engine.step import Step
from petalsd.errors import SessionClosed
from petalsd.kvcache.spill import SpillArea
from petalsd.types import BlockSpan
from tests.engine.rig import Gate, TinyModel, feed, opened, serving, states, with_hook
from tests.numeric import assert_close

SPAN = BlockSpan(1, 3)


async def carry(giver: Session, taker: Session, chunk_tokens: int) -> None:
    for block in giver.spec.span:
        for start in range(0, giver.position, chunk_tokens):
            place = Place(block, start, min(giver.position, start + chunk_tokens))
            keys, values = await giver.read_kv(place)
            assert keys.shape == values.shape == (giver.spec.batch, place.end - start, 2, 16)
            await taker.write_kv(place, (keys, values))
    taker.resume_at(giver.position)


@pytest.mark.parametrize("is_spilled", [False, True])
async def test_a_carried_session_goes_on_exactly(llama: TinyModel, tmp_path: Path, is_spilled: bool) -> None:
    """Also with rows that changed places: what follows equals transformers', and can be rolled back."""
    hidden = states(2, 30)
    spill = SpillArea(tmp_path, 1 << 24, 0) if is_spilled else None
    async with (
        serving(llama, kv_tokens=48, spill=spill) as first,
        serving(llama, kv_tokens=48, spill=spill) as second,
        opened(first, SPAN, batch=2, max_tokens=30) as giver,
        opened(second, SPAN, batch=2, max_tokens=30) as taker,
    ):
        await feed(giver, hidden[:, :18], [17, 1])
        swapped = await giver.step(Step(hidden[[1, 0], 18:21], 18, hypo_ids=(1, 0)))
        if is_spilled:
            async with opened(first, batch=1, max_tokens=48) as greedy:
                await greedy.step(Step(states(1, 48), 0))
        await carry(giver, taker, chunk_tokens=7)
        assert taker.position == 21
        rolled = await taker.step(Step(hidden[[1, 0], 20:21], 20))
        answer = await feed(taker, hidden[[1, 0], 21:], [1, 5, 3])
    expected = llama.expected(hidden[[1, 0]], SPAN).detach()
    assert_close(swapped, expected[:, 18:21], 1e-4, 1e-4, "before")
    assert_close(torch.cat([rolled, answer], 1), expected[:, 20:], 1e-4, 1e-4, "after")


async def test_transfers_go_between_the_steps_of_others(llama: TinyModel) -> None:
    """Another session decodes all the time, and its numbers stay right."""
    hidden = states(1, 40, seed=1)
    async with (
        serving(llama) as engine,
        opened(engine, max_tokens=40) as other,
        opened(engine, max_tokens=40) as giver,
        opened(engine, max_tokens=40) as taker,
    ):
        await feed(giver, states(1, 32), [32])
        decoding = asyncio.create_task(feed(other, hidden, [1] * 40))
        await carry(giver, taker, chunk_tokens=1)
        assert_close(await decoding, llama.expected(hidden).detach(), 1e-4, 1e-4, "the other's steps")


async def test_an_ended_session_moves_nothing(llama: TinyModel) -> None:
    """Its chunks are refused, also those that wait when it ends."""
    async with serving(llama) as engine, opened(engine, SPAN) as session:
        await session.step(Step(states(1, 4), 0))
        reading = asyncio.create_task(session.read_kv(Place(1, 0, 4)))
        session.end("moving out")
        await session.close()
        with pytest.raises(SessionClosed):
            await reading
        with pytest.raises(SessionClosed, match="moving out"):
            await session.read_kv(Place(1, 0, 4))


async def test_a_chunk_that_waits_hears_that_the_span_is_dropped(llama: TinyModel, gate: Gate) -> None:
    """At once: nobody will ever move it, and the deadline of a step is a minute."""
    blocks = with_hook(llama, 3, gate)
    async with serving(llama, blocks=blocks) as engine, opened(engine, SPAN) as session:
        await session.step(Step(states(1, 4), 0))
        async with opened(engine, BlockSpan(3, 4)) as other:
            step = asyncio.create_task(other.step(Step(states(1, 1), 0)))
            await gate.wait_until_reached()
            reading = asyncio.create_task(session.read_kv(Place(1, 0, 4)))
            await asyncio.sleep(0)  # it waits behind the step now
            dropping = asyncio.create_task(engine.drop_span("all blocks move"))
            with pytest.raises(SessionClosed, match="all blocks move"):
                await reading
            gate.opened.set()
            await dropping
            with pytest.raises(SessionClosed):
                await step
