"""The engine's own life: spans that come and go, deadlines, stopping, the self-test."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from petalsd.engine.core import EngineCore
from petalsd.engine.engine import Engine
from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import PassRequest, SessionSpec, Step
from petalsd.errors import DeadlineExceeded, Draining, EngineError, NotServed, SessionClosed
from petalsd.kvcache.spill import SpillArea
from petalsd.types import BlockSpan
from tests.engine.rig import CPU, Gate, HookedBlock, TinyModel, opened, serving, states, with_hook
from tests.numeric import assert_close


async def test_dropping_the_span_ends_everything(llama: TinyModel, gate: Gate) -> None:
    """drop_span ends running and idle sessions with its reason, waits and passes, and then nothing is served."""
    async with serving(llama, blocks=with_hook(llama, 0, gate), kv_tokens=64) as engine:
        pool = engine.pool
        assert pool is not None
        running = await engine.open_session(SessionSpec(BlockSpan(0, 4), 1, 32, "p"))
        idle = await engine.open_session(SessionSpec(BlockSpan(0, 4), 1, 32, "p"))
        step = asyncio.create_task(running.step(Step(states(1, 2), 0)))
        await gate.wait_until_reached()
        spec = SessionSpec(BlockSpan(0, 4), 1, 32, "p", alloc_timeout_s=30)
        waiting = asyncio.create_task(engine.open_session(spec))
        a_pass = asyncio.create_task(engine.forward(PassRequest(BlockSpan(0, 4), states(1, 2), "p")))
        await asyncio.sleep(0)
        dropping = asyncio.create_task(engine.drop_span("moving house"))
        await asyncio.sleep(0)
        gate.opened.set()
        await dropping
        with pytest.raises(SessionClosed, match="moving house"):
            await step
        with pytest.raises(SessionClosed, match="moving house"):
            await idle.step(Step(states(1, 2), 0))
        for task in (waiting, a_pass):
            with pytest.raises(NotServed, match="moving house"):
                await task
        with pytest.raises(NotServed):
            await engine.open_session(spec)
        assert (engine.span, engine.stats().sessions, pool.stats().pages_reserved) == (None, 0, 0)


async def test_loading_another_span_replaces_the_first(llama: TinyModel) -> None:
    """load_span over a served span ends its sessions; new ones run on the new blocks."""
    async with serving(llama, blocks={0: llama.blocks[0], 1: llama.blocks[1]}) as engine:
        old = await engine.open_session(SessionSpec(BlockSpan(0, 2), 1, 8, "p"))
        await engine.load_span({2: llama.blocks[2], 3: llama.blocks[3]}, llama.pool(), llama.rope)
        with pytest.raises(SessionClosed, match="2:4"):
            await old.step(Step(states(1, 1), 0))
        with pytest.raises(NotServed):
            await engine.open_session(SessionSpec(BlockSpan(0, 2), 1, 8, "p"))
        hidden = states(1, 4)
        async with opened(engine) as session:
            actual = await session.step(Step(hidden, 0))
    expected = llama.expected(hidden, BlockSpan(2, 4)).detach()
    assert_close(actual, expected, atol=1e-4, rtol=1e-4, what="on the new span")


@pytest.mark.parametrize("blocks", [[], [0, 2]])
async def test_only_consecutive_blocks_can_be_served(llama: TinyModel, blocks: list[int]) -> None:
    """load_span refuses an empty span and one with a gap, and keeps what is served."""
    async with serving(llama) as engine:
        with pytest.raises(ValueError, match="consecutive"):
            await engine.load_span({i: llama.blocks[i] for i in blocks}, llama.pool(), llama.rope)
        assert engine.span == BlockSpan(0, 4)


async def test_a_step_has_a_deadline(llama: TinyModel, gate: Gate) -> None:
    """A step that the device does not answer in time gets DeadlineExceeded, and the session is over."""
    limits = EngineLimits(step_deadline_s=0.05)
    async with serving(llama, limits, with_hook(llama, 0, gate)) as engine:
        session = await engine.open_session(SessionSpec(BlockSpan(0, 4), 1, 8, "p"))
        with pytest.raises(DeadlineExceeded):
            await session.step(Step(states(1, 1), 0))
        assert engine.stats().busy_since_monotonic_s is not None
        gate.opened.set()
        with pytest.raises(SessionClosed):
            await session.step(Step(states(1, 1), 0))
        await session.close()


async def test_stopping_with_a_hanging_device_returns(llama: TinyModel, gate: Gate) -> None:
    """stop gives up on a thread that hangs in the device when its deadline is over."""
    engine = Engine(EngineLimits(), CPU, num_threads=1)
    await engine.start()
    await engine.load_span(with_hook(llama, 0, gate), llama.pool(), llama.rope)
    session = await engine.open_session(SessionSpec(BlockSpan(0, 4), 1, 8, "p"))
    step = asyncio.create_task(session.step(Step(states(1, 1), 0)))
    await gate.wait_until_reached()
    await engine.stop(deadline_s=0.05)
    with pytest.raises(SessionClosed, match="stopping"):
        await step


async def test_nothing_works_before_start_and_after_stop(llama: TinyModel) -> None:
    """An engine that is not running refuses with Draining; stopping twice and closing late are harmless."""
    engine = Engine(EngineLimits(), CPU, num_threads=1)
    spec = SessionSpec(BlockSpan(0, 4), 1, 8, "p")
    with pytest.raises(Draining):
        await engine.open_session(spec)
    await engine.start()
    await engine.load_span(llama.blocks, llama.pool(), llama.rope)
    session = await engine.open_session(spec)
    await engine.stop(deadline_s=10)
    await engine.stop(deadline_s=10)
    with pytest.raises(SessionClosed):
        await session.step(Step(states(1, 1), 0))
    await session.close()
    with pytest.raises(Draining):
        await engine.forward(PassRequest(BlockSpan(0, 4), states(1, 2), "p"))


async def test_self_test_passes_and_leaves_no_trace(llama: TinyModel) -> None:
    """The self-test crosses all blocks and gives its pages back."""
    async with serving(llama) as engine:
        await engine.self_test()
        assert engine.stats().steps_total == 2
        assert engine.stats().last_step_monotonic_s > 0


async def test_probes_cross_one_block_after_the_other(llama: TinyModel) -> None:
    """So that an idle engine costs next to nothing, and every block is looked at sooner or later."""
    crossed: list[int] = []

    def hooked(block: int) -> Any:
        return HookedBlock(llama.blocks[block], lambda _: crossed.append(block))

    async with serving(llama, blocks={block: hooked(block) for block in llama.blocks}) as engine:
        for _ in range(5):
            await engine.probe()
    assert crossed == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]


async def test_self_test_without_free_pages(llama: TinyModel) -> None:
    """When sessions hold all the pages the self-test still crosses the blocks."""
    async with serving(llama, kv_tokens=64) as engine, opened(engine, max_tokens=64):
        await engine.self_test()
        assert engine.stats().iterations_total > 0


async def test_self_test_finds_broken_blocks(llama: TinyModel) -> None:
    """Blocks that raise, or that answer NaN, fail the self-test with EngineError."""

    def spoil(hidden: torch.Tensor) -> None:
        hidden.fill_(torch.nan)

    def explode(hidden: torch.Tensor) -> None:
        raise RuntimeError("device lost")

    for hook in (spoil, explode):
        async with serving(llama, blocks=with_hook(llama, 2, hook)) as engine:
            with pytest.raises(EngineError):
                await engine.self_test()


async def test_closing_while_the_engine_stops_returns(llama: TinyModel, gate: Gate) -> None:
    """A session closed during stop is not left waiting for a thread that has gone, and its pages are back."""
    engine = Engine(EngineLimits(), CPU, num_threads=1)
    pool = llama.pool()
    await engine.start()
    await engine.load_span(with_hook(llama, 0, gate), pool, llama.rope)
    session = await engine.open_session(SessionSpec(BlockSpan(0, 4), 1, 8, "p"))
    step = asyncio.create_task(session.step(Step(states(1, 1), 0)))
    await gate.wait_until_reached()
    stopping = asyncio.create_task(engine.stop(deadline_s=10))
    await asyncio.sleep(0)
    closing = asyncio.create_task(session.close())
    await asyncio.sleep(0)
    gate.opened.set()
    async with asyncio.timeout(30):
        await asyncio.gather(stopping, closing)
    with pytest.raises(SessionClosed):
        await step
    assert pool.stats().pages_reserved == 0


async def test_an_engine_can_be_started_again(llama: TinyModel) -> None:
    """After a stop the same engine starts, serves and stops once more."""
    engine = Engine(EngineLimits(), CPU, num_threads=1)
    for _ in range(2):
        await engine.start()
        await engine.load_span(llama.blocks, llama.pool(), llama.rope)
        await engine.self_test()
        await engine.stop(deadline_s=10)
        assert engine.span is None


async def test_a_self_test_that_is_given_up_does_not_wait_for_the_device(
    llama: TinyModel, gate: Gate
) -> None:
    """Whoever bounds the self-test gets the loop back at once, though the device still hangs in it."""
    async with serving(llama, blocks=with_hook(llama, 0, gate)) as engine:
        canary = asyncio.create_task(engine.self_test())
        await gate.wait_until_reached()
        canary.cancel()
        done, _ = await asyncio.wait({canary}, timeout=5)
        gate.opened.set()
        assert done == {canary}
        assert canary.cancelled()


async def test_a_bug_between_iterations_is_noticed(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends every session with EngineError, nothing new is taken on, and a new start heals it."""
    async with serving(llama) as engine:
        spec = SessionSpec(BlockSpan(0, 4), 1, 8, "p")
        running, idle = await engine.open_session(spec), await engine.open_session(spec)
        with monkeypatch.context() as patch:
            patch.setattr(EngineCore, "pause_s", _broken)
            async with asyncio.timeout(5):
                with pytest.raises(EngineError):
                    await running.step(Step(states(1, 2), 0))
        async with asyncio.timeout(5):
            with pytest.raises(EngineError):
                await idle.step(Step(states(1, 2), 0))
            with pytest.raises(EngineError):
                await engine.self_test()
            with pytest.raises(EngineError):
                await engine.open_session(spec)
            await running.close()
            await idle.close()
            await engine.stop(5.0)
        await engine.start()
        await engine.load_span(llama.blocks, llama.pool(), llama.rope)
        await engine.self_test()


def _broken(core: EngineCore) -> float:
    raise RuntimeError("a bug")


async def test_dropped_blocks_and_pages_are_free_whoever_holds_a_session(
    llama: TinyModel, tmp_path: Path
) -> None:
    """At once, without the garbage collector: what is loaded next needs the memory."""
    blocks, pool = with_hook(llama, 1, lambda hidden: None), llama.pool(spill=SpillArea(tmp_path, 1 << 20, 0))
    engine = Engine(EngineLimits(), CPU, 1)
    await engine.start()
    await engine.load_span(blocks, pool, llama.rope)
    session = await engine.open_session(SessionSpec(llama.span, 1, 8, "peer"))
    await session.step(Step(states(1, 2), 0))
    held = [weakref.ref(blocks.pop(1)), weakref.ref(pool.kv.k)]
    del pool
    gc.disable()
    try:
        await engine.drop_span("the test drops it")
        assert [one() for one in held] == [None, None] and session.end_reason is not None
    finally:
        gc.enable()
        await engine.stop(deadline_s=10)
