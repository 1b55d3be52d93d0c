"""What a real engine tells its observer: steps, batches, passes, admissions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import torch

from petalsd.engine.engine import Engine
from petalsd.engine.limits import EngineLimits
from petalsd.engine.observer import BatchReport, PassTiming, StepTiming
from petalsd.engine.step import PassRequest, SessionSpec, Step
from petalsd.errors import EngineError, OutOfPages
from petalsd.types import BlockSpan
from tests.engine.rig import Gate, TinyModel, feed, opened, serving, states, with_hook

SPAN = BlockSpan(0, 4)
HOLD_S = 0.2  # what others wait for, against the little that nobody waits for
SMALL_BATCH = EngineLimits(max_batch_tokens=16, prefill_chunk_tokens=8)


@dataclass
class Notes:
    """``engine.observer.EngineObserver`` that keeps what it hears."""

    batches: list[BatchReport] = field(default_factory=list)
    passes: list[PassTiming] = field(default_factory=list)
    admissions: list[float] = field(default_factory=list)

    def batch_done(self, report: BatchReport) -> None:
        self.batches.append(report)

    def pass_done(self, timing: PassTiming) -> None:
        self.passes.append(timing)

    def session_admitted(self, wait_s: float) -> None:
        self.admissions.append(wait_s)

    def steps(self) -> list[StepTiming]:
        return [step for batch in self.batches for step in batch.steps]


@asynccontextmanager
async def observed(
    model: TinyModel, limits: EngineLimits | None = None, **options: object
) -> AsyncIterator[tuple[Engine, Notes]]:
    """An engine, and what it tells: all of it once a session that it has was closed."""
    notes = Notes()
    async with serving(model, limits, observer=notes, **options) as engine:  # type: ignore[arg-type]
        yield engine, notes


async def told(engine: Engine) -> None:
    """The answers come before the telling; the closing of a session comes after it."""
    async with opened(engine):
        pass


async def test_steps_are_told_by_phase(llama: TinyModel) -> None:
    """A prefill and two decode steps of two rows: tokens over all rows, one step completed by each batch."""
    async with observed(llama) as (engine, notes), opened(engine, batch=2) as session:
        await feed(session, states(2, 9), [7, 1, 1])
    told = [(one.rows, one.prefill_tokens, one.decode_tokens, len(one.steps)) for one in notes.batches]
    assert told == [(2, 14, 0, 1), (2, 0, 2, 1), (2, 0, 2, 1)]
    assert [step.is_prefill for step in notes.steps()] == [True, False, False]
    for batch in notes.batches:
        (step,) = batch.steps
        assert 0 <= step.queue_s <= step.total_s
        assert 0 < batch.duration_s <= step.total_s


async def test_a_chunked_prefill_is_one_step_of_many_batches(llama: TinyModel) -> None:
    """All its tokens are prefill, the last chunk of one token too; it is answered by the last batch."""
    async with observed(llama, SMALL_BATCH) as (engine, notes), opened(engine) as session:
        await feed(session, states(1, 33), [33])
    assert sum(batch.prefill_tokens for batch in notes.batches) == 33
    assert sum(batch.decode_tokens for batch in notes.batches) == 0
    assert [len(batch.steps) for batch in notes.batches[:-1]] == [0] * (len(notes.batches) - 1)
    (step,) = notes.batches[-1].steps
    assert step.is_prefill
    assert step.total_s >= sum(batch.duration_s for batch in notes.batches)


async def test_waiting_behind_others_is_queueing(llama: TinyModel, gate: Gate) -> None:
    """A step that came while the device was busy waited in the queue for as long as that lasted."""
    blocks = with_hook(llama, 0, gate)
    async with (
        observed(llama, blocks=blocks) as (engine, notes),
        opened(engine) as first,
        opened(engine) as second,
    ):
        running = asyncio.create_task(first.step(Step(states(1, 3), 0)))
        await gate.wait_until_reached()
        waiting = asyncio.create_task(second.step(Step(states(1, 1), 0)))
        await asyncio.sleep(HOLD_S)
        gate.opened.set()
        await asyncio.gather(running, waiting)
    at_once, queued = notes.steps()
    assert at_once.queue_s < HOLD_S <= at_once.total_s
    assert queued.queue_s >= HOLD_S


async def test_sessions_that_run_together_are_one_batch(llama: TinyModel, gate: Gate) -> None:
    """What gathered while the device was busy is told once, with the rows of all."""
    blocks = with_hook(llama, 0, gate)
    async with (
        observed(llama, blocks=blocks) as (engine, notes),
        opened(engine) as busy,
        opened(engine, batch=2) as one,
        opened(engine, batch=3) as other,
    ):
        tasks = [asyncio.create_task(busy.step(Step(states(1, 2), 0)))]
        await gate.wait_until_reached()
        tasks += [asyncio.create_task(one.step(Step(states(2, 1), 0)))]
        tasks += [asyncio.create_task(other.step(Step(states(3, 1), 0)))]
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(*tasks)
    together = notes.batches[-1]
    assert (together.rows, together.decode_tokens, len(together.steps)) == (5, 5, 2)


async def test_self_tests_and_empty_steps_are_not_told(llama: TinyModel) -> None:
    """Neither is anything that a client got computed."""
    async with observed(llama) as (engine, notes):
        await engine.self_test()
        async with opened(engine) as session:
            await session.step(Step(states(1, 0), 0))
        assert engine.stats().iterations_total > 0
    assert (notes.batches, notes.passes, len(notes.admissions)) == ([], [], 1)


async def test_a_self_test_without_room_for_a_session_is_not_told_either(llama: TinyModel) -> None:
    """It goes as a pass then."""
    async with observed(llama, kv_tokens=64) as (engine, notes), opened(engine, max_tokens=64):
        await engine.self_test()
        assert engine.stats().iterations_total > 0
    assert notes.passes == []


async def test_a_step_that_fails_is_not_an_answered_one(llama: TinyModel) -> None:
    """Its neighbour in the same batch is told all the same."""

    def fail(hidden: torch.Tensor) -> None:
        if bool((hidden == 7.0).any()):
            raise RuntimeError("bad input")

    async with (
        observed(llama, blocks=with_hook(llama, 0, fail)) as (engine, notes),
        opened(engine) as good,
        opened(engine) as bad,
    ):
        outcomes = await asyncio.gather(
            good.step(Step(states(1, 2), 0)),
            bad.step(Step(torch.full((1, 2, 64), 7.0), 0)),
            return_exceptions=True,
        )
    assert isinstance(outcomes[1], EngineError)
    assert len(notes.steps()) == 1
    assert sum(batch.prefill_tokens for batch in notes.batches) == 2


async def test_passes_are_told_with_their_direction_and_size(llama: TinyModel) -> None:
    """Forward and backward of two rows of five tokens; one that fails is not told."""
    hidden = states(2, 5)
    async with observed(llama) as (engine, notes):
        await engine.forward(PassRequest(SPAN, hidden, "p"))
        await engine.backward(PassRequest(SPAN, hidden, "p", grad_output=hidden))
        await told(engine)
    assert [(timing.is_backward, timing.tokens) for timing in notes.passes] == [(False, 10), (True, 10)]
    assert all(0 <= timing.queue_s < timing.total_s for timing in notes.passes)


async def test_a_pass_waits_behind_the_one_before_it(llama: TinyModel, gate: Gate) -> None:
    """The second has waited until the first was done."""
    async with observed(llama, blocks=with_hook(llama, 0, gate)) as (engine, notes):
        first = asyncio.create_task(engine.forward(PassRequest(SPAN, states(1, 3), "p")))
        await gate.wait_until_reached()
        second = asyncio.create_task(engine.forward(PassRequest(SPAN, states(1, 3), "q")))
        await asyncio.sleep(HOLD_S)
        gate.opened.set()
        await asyncio.gather(first, second)
        await told(engine)
    assert notes.passes[0].queue_s < HOLD_S <= notes.passes[1].queue_s


async def test_admission_tells_the_wait_for_pages(llama: TinyModel) -> None:
    """One that got its pages at once, one that waited for them, and none for the one that was refused."""
    async with observed(llama, kv_tokens=64) as (engine, notes):
        holder = await engine.open_session(SessionSpec(SPAN, 1, 64, "p"))
        waiting = asyncio.create_task(engine.open_session(SessionSpec(SPAN, 1, 64, "q", alloc_timeout_s=30)))
        await asyncio.sleep(HOLD_S)
        with pytest.raises(OutOfPages):
            await engine.open_session(SessionSpec(SPAN, 1, 64, "r"))
        await holder.close()
        await (await waiting).close()
    at_once, waited = notes.admissions
    assert at_once < HOLD_S <= waited
