"""What goes wrong stays where it went wrong: bad steps, bad blocks, NaN, cancelling, too much at once."""

from __future__ import annotations

import asyncio

import pytest
import torch

from petalsd.engine.engine import Engine
from petalsd.engine.handle import Session
from petalsd.engine.kv_transfer import Place
from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import SessionSpec, Step
from petalsd.errors import (
    BadRequest,
    EngineError,
    NotServed,
    OutOfPages,
    Overloaded,
    PetalsdError,
    SessionClosed,
)
from petalsd.types import BlockSpan
from tests.engine.rig import Gate, HookedBlock, TinyModel, feed, opened, serving, states, with_hook
from tests.numeric import assert_close

POISON = 12345.0
"""A value in the states that makes a ``poisoned`` block fail."""


def fail_on_poison(hidden: torch.Tensor) -> None:
    if (hidden == POISON).any():
        raise RuntimeError("poisoned")


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


async def test_one_peer_leaves_rows_to_others(llama: TinyModel) -> None:
    """A peer has its share of the rows, by one session or many; its first one may be larger."""
    limits = EngineLimits(max_sessions=8, max_peer_share=0.5)
    async with serving(llama, limits) as engine:
        first = [await engine.open_session(SessionSpec(BlockSpan(0, 1), 1, 4, "greedy")) for _ in range(4)]
        with pytest.raises(
            Overloaded, match="4 rows of yours are open, 1 more were asked for, a peer may have 4"
        ):
            await engine.open_session(SessionSpec(BlockSpan(0, 1), 1, 4, "greedy"))
        other = await engine.open_session(SessionSpec(BlockSpan(0, 1), 3, 4, "modest"))
        for session in (*first, other):
            await session.close()
        assert engine.stats().rows == 0
        await (await engine.open_session(SessionSpec(BlockSpan(0, 1), 6, 4, "greedy"))).close()


async def test_rows_count_to_who_pays(llama: TinyModel) -> None:
    """A session that came from another server takes a row of its client's share once that has come."""
    limits = EngineLimits(max_sessions=8, max_peer_share=0.25)
    async with serving(llama, limits) as engine:
        specs = [SessionSpec(BlockSpan(0, 1), 1, 4, "client") for _ in range(3)]
        mine = [await engine.open_session(spec) for spec in specs[:2]]
        handed = await engine.open_session(specs[2], payer="giver")
        with pytest.raises(Overloaded, match="2 rows of yours"):
            handed.charge_to("client")
        await mine[0].close()
        handed.charge_to("client")
        again = [await engine.open_session(SessionSpec(BlockSpan(0, 1), 1, 4, "giver")) for _ in range(2)]
        for session in (mine[1], handed, *again):
            await session.close()
        assert engine.stats().rows == 0


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


@pytest.mark.parametrize("is_transfer", [False, True])
async def test_what_fails_in_the_engine_does_not_look_like_what_hangs(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, is_transfer: bool
) -> None:
    """The watchdog asks since when the engine is at what it does: it is idle, and has proved nothing."""

    def run_out_of_memory() -> None:
        raise MemoryError

    async with serving(llama) as engine, opened(engine) as session:
        assert engine.pool is not None
        await session.step(Step(states(1, 3), 0))
        before = engine.stats().iterations_total
        monkeypatch.setattr(engine.pool, "apply_copies", run_out_of_memory)
        with pytest.raises(EngineError):
            if is_transfer:
                await session.read_kv(Place(BlockSpan(0, 1), 0, 3))
            else:
                await session.step(Step(states(1, 1), 3))
        stats = engine.stats()
        assert (stats.busy_since_monotonic_s, stats.iterations_total) == (None, before)
