"""What goes wrong stays where it went wrong: bad steps, bad blocks, NaN, cancelling, a hanging device, the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch

from petalsd.engine.engine import Engine
from petalsd.engine.handle import Session
from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import PassRequest, SessionSpec, Step
from petalsd.errors import (
    BadRequest,
    DeadlineExceeded,
    Draining,
    EngineError,
    NotServed,
    OutOfPages,
    Overloaded,
    PetalsdError,
    SessionClosed,
)
from petalsd.types import BlockSpan
from tests.engine.rig import CPU, HookedBlock, TinyModel, feed, opened, serving, states
from tests.numeric import assert_close

POISON = 12345.0
"""A value in the states that makes a ``poisoned`` block fail."""


def fail_on_poison(hidden: torch.Tensor) -> None:
    if (hidden == POISON).any():
        raise RuntimeError("poisoned")


class Gate:
    """Holds the engine thread inside a block until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, hidden: torch.Tensor) -> None:
        self.reached.set()
        self.opened.wait(timeout=30)

    async def wait_until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 30)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def with_hook(model: TinyModel, block: int, hook: object) -> dict[int, HookedBlock]:
    return {**model.blocks, block: HookedBlock(model.blocks[block], hook)}


async def in_one_batch(engine: Engine, gate: Gate, *steps: tuple[Session, torch.Tensor]) -> list[object]:
    """Hand in a step that holds the engine at the gate, then these, then open: they run in one batch."""
    async with opened(engine, BlockSpan(3, 4)) as holder:
        held = asyncio.create_task(holder.step(Step(states(1, 1), 0)))
        await gate.wait_until_reached()
        tasks = [
            asyncio.create_task(session.step(Step(hidden, session.position))) for session, hidden in steps
        ]
        await asyncio.sleep(0)  # each hands its step in
        gate.opened.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await held
    return results


async def test_a_failing_session_takes_no_other_with_it(llama: TinyModel, gate: Gate) -> None:
    """When a batch fails, the session that makes it fail gets EngineError and is over; the others get answers."""
    blocks = {**with_hook(llama, 1, fail_on_poison), 3: HookedBlock(llama.blocks[3], gate)}
    good, bad = states(1, 5), torch.full((1, 2, 64), POISON)
    async with (
        serving(llama, blocks=blocks) as engine,
        opened(engine, BlockSpan(0, 3)) as one,
        opened(engine, BlockSpan(1, 2)) as guilty,
        opened(engine, BlockSpan(0, 3), batch=2) as two,
    ):
        first, failure, second = await in_one_batch(
            engine, gate, (one, good), (guilty, bad), (two, good.expand(2, -1, -1))
        )
        assert isinstance(failure, EngineError)
        assert "RuntimeError" in str(failure)
        with pytest.raises(SessionClosed):
            await guilty.step(Step(good, 0))
        expected = llama.expected(good, BlockSpan(0, 3)).detach()
        assert_close(first, expected, atol=1e-4, rtol=1e-4, what="first bystander")
        assert_close(second, expected.expand(2, -1, -1), atol=1e-4, rtol=1e-4, what="second bystander")
        following = await one.step(Step(good[:, :1], 5))
    history = torch.cat((good, good[:, :1]), dim=1)
    expected = llama.expected(history, BlockSpan(0, 3)).detach()[:, 5:]
    assert_close(following, expected, atol=1e-4, rtol=1e-4, what="the bystander's next step")


async def test_nan_stays_in_its_session(llama: TinyModel, gate: Gate) -> None:
    """NaN in one session reaches neither those in its batch nor those that get its pages later."""
    blocks = with_hook(llama, 3, gate)
    span, good = BlockSpan(0, 3), states(1, 9)
    expected = llama.expected(good, span).detach()
    async with serving(llama, blocks=blocks, kv_tokens=64) as engine:
        async with opened(engine, span, max_tokens=24) as clean, opened(engine, span, max_tokens=24) as dirty:
            actual, nan = await in_one_batch(
                engine, gate, (clean, good), (dirty, torch.full_like(good, torch.nan))
            )
            assert_close(actual, expected, atol=1e-4, rtol=1e-4, what="in the same batch")
            assert isinstance(nan, torch.Tensor)
            assert nan.isnan().all()
        async with opened(engine, span, max_tokens=48) as later:
            actual = await feed(later, good, [3, 1, 5])
            assert_close(actual, expected, atol=1e-4, rtol=1e-4, what="on the same pages")


async def test_cancelling_a_step_frees_the_pages(llama: TinyModel, gate: Gate) -> None:
    """A session whose step is cancelled while the device works on it is over, and its pages go back."""
    async with serving(llama, blocks=with_hook(llama, 2, gate)) as engine:
        async with opened(engine) as session:
            task = asyncio.create_task(session.step(Step(states(1, 40), 0)))
            await gate.wait_until_reached()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.opened.set()
            with pytest.raises(SessionClosed):
                await session.step(Step(states(1, 1), 0))
        assert engine.pool is not None
        assert engine.pool.stats().pages_reserved == 0
        async with opened(engine) as following:
            await following.step(Step(states(1, 3), 0))


async def test_closing_during_a_step_of_many_chunks(llama: TinyModel, gate: Gate) -> None:
    """Closing a session in mid-prefill ends its step with SessionClosed and drops the chunks to come."""
    limits = EngineLimits(max_batch_tokens=8, prefill_chunk_tokens=4)
    async with serving(llama, limits, with_hook(llama, 0, gate)) as engine, opened(engine) as session:
        task = asyncio.create_task(session.step(Step(states(1, 60), 0)))
        await gate.wait_until_reached()
        closing = asyncio.create_task(session.close())
        await asyncio.sleep(0)
        gate.opened.set()
        await closing
        with pytest.raises(SessionClosed):
            await task
        assert engine.stats().iterations_total == 1
        await session.close()


REFUSED_STEPS = {
    "two dimensions": (Step(torch.zeros(2, 64), 0), "hidden states"),
    "wrong width": (Step(torch.zeros(2, 1, 65), 0), "hidden states"),
    "wrong batch": (Step(torch.zeros(1, 1, 64), 0), "hidden states"),
    "integers": (Step(torch.zeros(2, 1, 64, dtype=torch.int64), 0), "hidden states"),
    "negative start": (Step(torch.zeros(2, 1, 64), -1), "start_from_position"),
    "start beyond": (Step(torch.zeros(2, 1, 64), 5), "start_from_position"),
    "too long": (Step(torch.zeros(2, 17, 64), 4), "max_length"),
    "prompts of other span": (Step(torch.zeros(2, 1, 64), 4, torch.zeros(3, 1, 1, 64)), "prompts"),
    "prompts of other batch": (Step(torch.zeros(2, 1, 64), 4, torch.zeros(4, 3, 1, 64)), "prompts"),
    "prompts of other width": (Step(torch.zeros(2, 1, 64), 4, torch.zeros(4, 2, 1, 63)), "prompts"),
    "prompts of three dimensions": (Step(torch.zeros(2, 1, 64), 4, torch.zeros(4, 1, 64)), "prompts"),
    "prompts of integers": (
        Step(torch.zeros(2, 1, 64), 4, torch.zeros(4, 1, 1, 64, dtype=torch.int32)),
        "prompts",
    ),
    "long prefix": (Step(torch.zeros(2, 1, 64), 4, torch.zeros(4, 1, 2, 64)), "prompts"),
    "few hypo_ids": (Step(torch.zeros(2, 1, 64), 4, hypo_ids=(0,)), "hypo_ids"),
    "large hypo_ids": (Step(torch.zeros(2, 1, 64), 4, hypo_ids=(0, 2)), "hypo_ids"),
    "negative hypo_ids": (Step(torch.zeros(2, 1, 64), 4, hypo_ids=(-1, 0)), "hypo_ids"),
}


@pytest.mark.parametrize("name", REFUSED_STEPS)
async def test_a_refused_step_changes_nothing(llama: TinyModel, name: str) -> None:
    """A step that breaks a rule gets BadRequest naming the field; the session goes on as if it had not come."""
    step, field = REFUSED_STEPS[name]
    hidden = states(2, 6)
    async with serving(llama) as engine, opened(engine, batch=2, max_tokens=20) as session:
        await session.step(Step(hidden[:, :4], 0))
        with pytest.raises(BadRequest) as caught:
            await session.step(step)
        assert caught.value.field == field
        actual = await session.step(Step(hidden[:, 4:], 4))
    expected = llama.expected(hidden).detach()[:, 4:]
    assert_close(actual, expected, atol=1e-4, rtol=1e-4, what="the step after")


async def test_two_steps_at_once_are_refused(llama: TinyModel, gate: Gate) -> None:
    """A session takes one step at a time; the second gets BadRequest, the first its answer."""
    async with serving(llama, blocks=with_hook(llama, 0, gate)) as engine, opened(engine) as session:
        first = asyncio.create_task(session.step(Step(states(1, 2), 0)))
        await gate.wait_until_reached()
        with pytest.raises(BadRequest, match="not answered yet"):
            await session.step(Step(states(1, 1), 0))
        gate.opened.set()
        assert (await first).shape == (1, 2, 64)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (SessionSpec(BlockSpan(3, 5), 1, 8, "p"), NotServed),
        (SessionSpec(BlockSpan(0, 4), 0, 8, "p"), BadRequest),
        (SessionSpec(BlockSpan(0, 4), 9, 8, "p"), BadRequest),
        (SessionSpec(BlockSpan(0, 4), 1, -1, "p"), BadRequest),
        (SessionSpec(BlockSpan(0, 4), 1, 101, "p"), BadRequest),
        (SessionSpec(BlockSpan(0, 4), 6, 100, "p"), OutOfPages),
        (SessionSpec(BlockSpan(0, 4), 6, 100, "p", alloc_timeout_s=0.01), OutOfPages),
    ],
)
async def test_sessions_that_cannot_be(
    llama: TinyModel, spec: SessionSpec, error: type[PetalsdError]
) -> None:
    """A session outside the span, the limits or the memory is refused by its proper error and leaves no trace."""
    limits = EngineLimits(max_session_tokens=100, max_sessions=8)
    async with serving(llama, limits) as engine:
        with pytest.raises(error):
            await engine.open_session(spec)
        assert engine.stats().rows == 0


async def test_rows_are_bounded(llama: TinyModel) -> None:
    """No more than max_sessions rows are open at once, and closing makes room."""
    async with serving(llama, EngineLimits(max_sessions=4)) as engine, opened(engine, batch=3):
        async with opened(engine, batch=1):
            with pytest.raises(Overloaded):
                await engine.open_session(SessionSpec(BlockSpan(0, 1), 1, 4, "p"))
        async with opened(engine, batch=1):
            assert engine.stats().rows == 4


async def test_a_session_waits_for_pages(llama: TinyModel) -> None:
    """With an allocation timeout a session opens as soon as another gives its pages back."""
    async with serving(llama, kv_tokens=64) as engine:
        holder = await engine.open_session(SessionSpec(BlockSpan(0, 4), 1, 64, "p"))
        spec = SessionSpec(BlockSpan(0, 4), 1, 40, "q", alloc_timeout_s=30)
        waiting = asyncio.create_task(engine.open_session(spec))
        await asyncio.sleep(0)
        assert not waiting.done()
        await holder.close()
        await (await waiting).close()


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
