"""Sessions whose keys and values go from one engine's pages to another's, and go on there."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from petalsd.engine import core
from petalsd.engine.handle import Session
from petalsd.engine.kv_transfer import Place, RolledBack
from petalsd.engine.step import Step
from petalsd.errors import EngineError, SessionClosed
from petalsd.kvcache.spill import SpillArea
from petalsd.types import BlockSpan
from tests.engine.rig import Gate, HookedBlock, TinyModel, feed, opened, serving, states, with_hook
from tests.numeric import assert_close

SPAN = BlockSpan(1, 4)


async def carry(giver: Session, taker: Session, chunk_tokens: int) -> None:
    span = giver.spec.span
    for blocks in (BlockSpan(span.start, span.end - 1), BlockSpan(span.end - 1, span.end)):
        for start in range(0, giver.position, chunk_tokens):
            place = Place(blocks, start, min(giver.position, start + chunk_tokens))
            keys, values = await giver.read_kv(place)
            assert keys.shape == values.shape == (len(blocks), giver.spec.batch, place.end - start, 2, 16)
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


async def test_a_copy_is_made_beside_the_steps(llama: TinyModel) -> None:
    """What a step adds or changes is read again, until nothing is missing; the copy may have been longer once."""
    hidden = states(2, 30)
    async with (
        serving(llama) as engine,
        opened(engine, SPAN, batch=2, max_tokens=30) as giver,
        opened(engine, SPAN, batch=2, max_tokens=30) as taker,
    ):
        await giver.step(Step(hidden[:, :20], 0))

        async def copy(expected: range) -> None:
            missing = giver.copied.take()
            assert missing == expected
            place = Place(SPAN, missing.start, missing.stop)
            await taker.write_kv(place, await giver.read_kv(place))

        await copy(range(20))
        step = asyncio.create_task(giver.step(Step(hidden[:, 12:13], 12)))
        await asyncio.sleep(0)  # it is under way
        assert giver.copied.take() == range(12, 12)
        with pytest.raises(RolledBack):
            await giver.read_kv(Place(SPAN, 0, 20))
        await step
        await copy(range(12, 13))
        await giver.step(Step(hidden[[1, 0], 13:16], 13, hypo_ids=(1, 0)))
        await copy(range(16))
        giver.copied.give_back(range(9, 16))
        await copy(range(9, 16))
        taker.resume_at(giver.position)
        answer = await feed(taker, hidden[[1, 0], 16:], [1, 13])
    expected = llama.expected(hidden[[1, 0]], SPAN).detach()
    assert_close(answer, expected[:, 16:], 1e-4, 1e-4, "after")


@pytest.mark.parametrize(("time_s", "num_left"), [(10.0, 0), (0.0, 2)])
async def test_transfers_take_some_time_before_an_iteration(
    llama: TinyModel, gate: Gate, monkeypatch: pytest.MonkeyPatch, time_s: float, num_left: int
) -> None:
    """As many as go in it, at least one: sessions that leave together do not wait for an iteration each."""
    monkeypatch.setattr(core, "_TRANSFERS_S", time_s)
    left: list[int] = []

    def note(hidden: torch.Tensor) -> None:
        assert engine._core is not None
        left.append(len(engine._core._transfers))

    blocks = with_hook(llama, 3, gate) | {0: HookedBlock(llama.blocks[0], note)}
    async with serving(llama, blocks=blocks) as engine, contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(opened(engine, BlockSpan(0, 3))) for _ in range(4)]
        for session in sessions:
            await session.step(Step(states(1, 4), 0))
        async with opened(engine, BlockSpan(3, 4)) as other:
            work = [asyncio.create_task(other.step(Step(states(1, 1), 0)))]
            await gate.wait_until_reached()
            work += [asyncio.create_task(one.read_kv(Place(BlockSpan(0, 3), 0, 4))) for one in sessions[:3]]
            work.append(asyncio.create_task(sessions[3].step(Step(states(1, 1), 4))))
            await asyncio.sleep(0)  # all of it waits behind the step
            left.clear()
            gate.opened.set()
            await asyncio.gather(*work)
    assert left == [num_left]


@pytest.mark.parametrize("is_written", [False, True])
async def test_a_chunk_that_cannot_be_moved_is_nobody_elses_trouble(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    """As for want of memory on the device: who moves it gets EngineError, and other sessions go on."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hidden = states(1, 5)
    async with serving(llama) as engine, opened(engine) as other, opened(engine, SPAN) as session:
        assert engine.pool is not None
        first = await other.step(Step(hidden[:, :4], 0))
        await session.step(Step(states(1, 4), 0))
        place = Place(SPAN, 0, 4)
        chunk = await session.read_kv(place)
        with monkeypatch.context() as patch, capture_logs():
            patch.setattr(type(engine.pool.kv), "write" if is_written else "gather", fail)
            with pytest.raises(EngineError, match="OutOfMemoryError"):
                await (session.write_kv(place, chunk) if is_written else session.read_kv(place))
        second = await other.step(Step(hidden[:, 4:], 4))
    assert_close(torch.cat([first, second], 1), llama.expected(hidden).detach(), 1e-4, 1e-4, "the other's")


async def test_an_ended_session_moves_nothing(llama: TinyModel) -> None:
    """Its chunks are refused, also those that wait when it ends."""
    async with serving(llama) as engine, opened(engine, SPAN) as session:
        await session.step(Step(states(1, 4), 0))
        reading = asyncio.create_task(session.read_kv(Place(SPAN, 0, 4)))
        session.end("moving out")
        await session.close()
        with pytest.raises(SessionClosed):
            await reading
        with pytest.raises(SessionClosed, match="moving out"):
            await session.read_kv(Place(SPAN, 0, 4))


async def test_a_session_that_has_just_ended_does_not_go_on(llama: TinyModel) -> None:
    """Who filled it is told, not the journal."""
    async with serving(llama) as engine, opened(engine, SPAN) as session:
        session.end("moving out")
        with capture_logs() as logs, pytest.raises(SessionClosed, match="moving out"):
            try:
                session.resume_at(0)
            finally:
                await session.close()
        assert logs == []


async def test_a_chunk_that_waits_hears_that_the_span_is_dropped(llama: TinyModel, gate: Gate) -> None:
    """At once: nobody will ever move it, and the deadline of a step is a minute."""
    blocks = with_hook(llama, 0, gate)
    async with serving(llama, blocks=blocks) as engine, opened(engine, SPAN) as session:
        await session.step(Step(states(1, 4), 0))
        async with opened(engine, BlockSpan(0, 1)) as other:
            step = asyncio.create_task(other.step(Step(states(1, 1), 0)))
            await gate.wait_until_reached()
            reading = asyncio.create_task(session.read_kv(Place(SPAN, 0, 4)))
            await asyncio.sleep(0)  # it waits behind the step now
            dropping = asyncio.create_task(engine.drop_span("all blocks move"))
            with pytest.raises(SessionClosed, match="all blocks move"):
                await reading
            gate.opened.set()
            await dropping
            with pytest.raises(SessionClosed):
                await step
