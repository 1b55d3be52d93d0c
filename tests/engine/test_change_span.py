"""Another span under running sessions: who stays on blocks that are in both does not notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from petalsd.engine.engine import Engine
from petalsd.engine.step import PassRequest, SessionSpec, Step
from petalsd.errors import Draining, NotServed, SessionClosed
from petalsd.kvcache.spill import SpillArea
from petalsd.types import BlockSpan
from tests.engine.rig import Gate, TinyModel, feed, opened, serving, states, with_hook
from tests.numeric import assert_close
from tests.waiting import eventually

OLD, NEW, KEPT = BlockSpan(0, 3), BlockSpan(1, 4), BlockSpan(1, 3)


@asynccontextmanager
async def serving_old(
    llama: TinyModel, spill: SpillArea | None = None, kv_tokens: int = 48
) -> AsyncIterator[Engine]:
    blocks = {index: llama.blocks[index] for index in OLD}
    async with serving(llama, blocks=blocks, kv_tokens=kv_tokens, spill=spill) as engine:
        yield engine


async def change(engine: Engine, llama: TinyModel, span: BlockSpan = NEW) -> None:
    await engine.change_span({index: llama.blocks[index] for index in span})


@pytest.mark.parametrize("is_spilled", [False, True])
async def test_sessions_on_staying_blocks_go_on(llama: TinyModel, tmp_path: Path, is_spilled: bool) -> None:
    """The whole sequence equals transformers' across two changes, also for pages that lie in the spill file."""
    hidden = states(2, 24)
    spill = SpillArea(tmp_path, 1 << 24, 0) if is_spilled else None
    async with serving_old(llama, spill) as engine, opened(engine, KEPT, batch=2, max_tokens=24) as session:
        answers = [await feed(session, hidden[:, :9], [7, 1, 1])]
        await change(engine, llama)
        if is_spilled:
            async with opened(engine, NEW, batch=2, max_tokens=32) as greedy:
                await greedy.step(Step(states(2, 32), 0))
                assert engine.pool is not None and engine.pool.stats().pages_spilled
        answers.append(await feed(session, hidden[:, 9:20], [1, 10]))
        await change(engine, llama, OLD)
        answers.append(await feed(session, hidden[:, 20:], [1] * 4))
    assert_close(torch.cat(answers, 1), llama.expected(hidden, KEPT).detach(), 1e-4, 1e-4, "both changes")


async def test_a_step_and_a_pass_under_way_see_nothing_of_a_change(llama: TinyModel, gate: Gate) -> None:
    """The change waits for the batch that runs; a step of several chunks and a queued pass are answered after."""
    hidden = states(1, 6)
    hooked = with_hook(llama, 1, gate)
    async with serving(llama, blocks={i: hooked[i] for i in OLD}) as engine, opened(engine, KEPT) as session:
        step = asyncio.create_task(session.step(Step(hidden, 0)))
        await gate.wait_until_reached()
        a_pass = asyncio.create_task(engine.forward(PassRequest(KEPT, hidden, "p")))
        changing = asyncio.create_task(change(engine, llama))
        await asyncio.sleep(0)
        gate.opened.set()
        await changing
        expected = llama.expected(hidden, KEPT).detach()
        assert_close(await step, expected, 1e-4, 1e-4, "step")
        assert_close(await a_pass, expected, 1e-4, 1e-4, "pass")


async def test_an_ended_pass_is_not_begun_any_more(llama: TinyModel, gate: Gate) -> None:
    """It is dropped before anything else that is posted, the change of the blocks above all."""
    hooked = with_hook(llama, 1, gate)
    async with serving(llama, blocks={i: hooked[i] for i in OLD}) as engine, opened(engine, KEPT) as session:
        step = asyncio.create_task(session.step(Step(states(1, 2), 0)))
        await gate.wait_until_reached()
        a_pass = asyncio.create_task(engine.forward(PassRequest(OLD, states(1, 2), "p")))
        await asyncio.sleep(0)
        thread, core = engine._running_thread(), engine._serving_core()
        left: list[bool] = []
        engine.end_work("it moves", keeping=KEPT)
        thread.post(lambda: left.append(bool(core.passes)))
        gate.opened.set()
        await step
        with pytest.raises(Draining, match="it moves"):
            await a_pass
    assert left == [False]


async def test_new_blocks_are_served_and_left_ones_are_not(llama: TinyModel) -> None:
    """A session on a left block ends with the reason, its pages come back, and the new span takes sessions."""
    hidden = states(1, 5)
    async with serving_old(llama) as engine:
        leaving = await engine.open_session(SessionSpec(OLD, 1, 16, "p"))
        await leaving.step(Step(hidden, 0))
        await change(engine, llama)
        with pytest.raises(SessionClosed, match="1:4"):
            await leaving.step(Step(hidden[:, :1], 5))
        assert engine.span == NEW and engine.pool is not None and engine.pool.stats().pages_reserved == 0
        with pytest.raises(NotServed):
            await engine.open_session(SessionSpec(OLD, 1, 16, "p"))
        async with opened(engine, NEW) as session:
            answer = await session.step(Step(hidden, 0))
        await engine.self_test()
    assert_close(answer, llama.expected(hidden, NEW).detach(), 1e-4, 1e-4, "on the new span")


async def test_a_restriction_refuses_new_work_on_leaving_blocks_only(llama: TinyModel) -> None:
    """Draining names the blocks; open work goes on and is counted; the canary crosses everything."""
    async with (
        serving_old(llama, kv_tokens=512) as engine,
        opened(engine, OLD) as leaving,
        opened(engine, KEPT) as staying,
    ):
        engine.restrict(KEPT, "this server moves to blocks 1:4")
        for work in (
            engine.open_session(SessionSpec(OLD, 1, 16, "p")),
            engine.forward(PassRequest(BlockSpan(0, 1), states(1, 2), "p")),
        ):
            with pytest.raises(Draining, match="moves to blocks 1:4"):
                await work
        async with opened(engine, KEPT):
            assert (engine.work_outside(KEPT), engine.work_outside(None)) == (1, 3)
        await leaving.step(Step(states(1, 2), 0))
        await engine.self_test()
        engine.end_work("they leave", keeping=KEPT)
        with pytest.raises(SessionClosed, match="they leave"):
            await leaving.step(Step(states(1, 1), 2))
        await staying.step(Step(states(1, 2), 0))
        engine.restrict(None, "all of it")
        with pytest.raises(Draining, match="all of it"):
            await engine.open_session(SessionSpec(KEPT, 1, 16, "p"))
        engine.lift_restriction()
        async with opened(engine, OLD):
            pass


async def test_a_probe_waits_for_the_change_and_crosses_what_is_served_then(
    llama: TinyModel, gate: Gate
) -> None:
    """It was asked for when block 0 was still served."""
    hooked = with_hook(llama, 1, gate)
    async with serving(llama, blocks={i: hooked[i] for i in OLD}) as engine, opened(engine, KEPT) as session:
        step = asyncio.create_task(session.step(Step(states(1, 2), 0)))
        await gate.wait_until_reached()
        changing = asyncio.create_task(change(engine, llama))
        await eventually(engine._canary_turn.locked)
        probing = asyncio.create_task(engine.probe())
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(step, changing, probing)


async def test_who_waits_for_pages_on_leaving_blocks_is_refused(llama: TinyModel) -> None:
    """A wait that began before the restriction ends with Draining, and holds no pages."""
    async with serving_old(llama) as engine:
        holder = await engine.open_session(SessionSpec(OLD, 1, 64, "p"))
        spec = SessionSpec(OLD, 1, 64, "p", alloc_timeout_s=30)
        waiting = asyncio.create_task(engine.open_session(spec))
        await asyncio.sleep(0)
        engine.restrict(KEPT, "moving")
        await holder.close()
        with pytest.raises(Draining, match="moving"):
            await waiting
