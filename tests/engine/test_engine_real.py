"""Steps through real blocks: alone, together, chunked, rolled back, reordered; against transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import Step
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel, feed, opened, serving, states
from tests.numeric import assert_close
from tests.tiny_models import FAMILIES

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
SMALL_BATCH = EngineLimits(max_batch_tokens=16, prefill_chunk_tokens=8)


@pytest.mark.parametrize("family", FAMILIES)
async def test_prefill_and_decode_equal_transformers(family: str, tmp_path: Path) -> None:
    """A prefill and single-token steps after it give transformers' states, in every family."""
    model = TinyModel(tmp_path, family)
    hidden = states(2, 30)
    async with serving(model) as engine, opened(engine, batch=2) as session:
        actual = await feed(session, hidden, [20] + [1] * 10)
        assert session.position == 30
    assert_close(actual, model.expected(hidden).detach(), **TOLERANCE, what=family)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
async def test_chunks_use_the_frequencies_of_the_whole_step(rope: str, tmp_path: Path) -> None:
    """With length-dependent RoPE a chunked prefill uses the step's length, as transformers does."""
    model = TinyModel(tmp_path, rope=rope, max_position_embeddings=32)
    hidden = states(1, 48)
    async with serving(model, SMALL_BATCH) as engine, opened(engine) as session:
        actual = await feed(session, hidden, [48])
    assert_close(actual, model.expected(hidden).detach(), **TOLERANCE, what=rope)


async def test_sessions_of_all_shapes_run_together(llama: TinyModel) -> None:
    """Sessions of different sub-ranges, batch sizes, lengths and peers at once answer what each does alone."""
    shapes = [
        (BlockSpan(0, 4), 1, [7, 1, 1, 1]),
        (BlockSpan(0, 2), 3, [5, 1, 2, 1]),
        (BlockSpan(1, 3), 2, [1, 1, 1, 9]),
        (BlockSpan(3, 4), 1, [40, 1]),
        (BlockSpan(2, 4), 2, [3, 3, 3]),
        (BlockSpan(0, 1), 1, [1] * 8),
    ]
    inputs = [states(batch, sum(chunks), seed) for seed, (_, batch, chunks) in enumerate(shapes)]

    async with serving(llama, SMALL_BATCH) as engine:

        async def run(number: int) -> torch.Tensor:
            span, batch, chunks = shapes[number]
            async with opened(engine, span, batch, peer=f"peer-{number % 3}") as session:
                return await feed(session, inputs[number], chunks)

        together = await asyncio.gather(*(run(number) for number in range(len(shapes))))
        alone = [await run(number) for number in range(len(shapes))]
    for (span, batch, _), hidden, actual, solo in zip(shapes, inputs, together, alone, strict=True):
        what = f"{span} x {batch}"
        assert_close(actual, solo, atol=1e-5, rtol=1e-5, what=f"{what}, together and alone")
        assert_close(actual, llama.expected(hidden, span).detach(), **TOLERANCE, what=what)


async def test_chunked_prefill_equals_unchunked(llama: TinyModel) -> None:
    """A prefill split over many iterations answers what one iteration answers, within rounding."""
    hidden = states(3, 50)
    answers = []
    for limits in (EngineLimits(), SMALL_BATCH):
        async with serving(llama, limits) as engine, opened(engine, batch=3) as session:
            answers.append(await feed(session, hidden, [50]))
            iterations = engine.stats().iterations_total
    assert iterations > 5
    assert_close(answers[1], answers[0], atol=1e-5, rtol=1e-5, what="chunked prefill")


@pytest.mark.parametrize("limits", [EngineLimits(), SMALL_BATCH], ids=["whole", "chunked"])
@pytest.mark.parametrize("prompt_rows", [1, 2])
async def test_prompts_are_added_at_each_block(
    llama: TinyModel, limits: EngineLimits, prompt_rows: int
) -> None:
    """Slice k of the prompts is added to the first tokens of the step at the input of the span's block k."""
    span = BlockSpan(1, 4)
    hidden = states(2, 25)
    prompts = torch.randn(3, prompt_rows, 11, hidden.shape[2], generator=torch.Generator().manual_seed(9))
    async with (
        serving(llama, limits) as engine,
        opened(engine, span, batch=2) as session,
        opened(engine, BlockSpan(0, 2)) as other,
    ):
        before = hidden.clone()
        neighbour = asyncio.create_task(feed(other, states(1, 20, seed=5), [10] + [1] * 10))
        actual = await session.step(Step(hidden, 0, prompts=prompts))
        await neighbour
    assert torch.equal(hidden, before), "the client's own tensor was written to"
    expected = hidden.clone()
    for k, block in enumerate(span):
        expected[:, :11] += prompts[k]
        expected = llama.expected(expected, BlockSpan(block, block + 1)).detach()
    assert_close(actual, expected, **TOLERANCE, what="states with prompts")


async def test_prompts_count_from_the_start_of_their_step(llama: TinyModel) -> None:
    """Prompts of a later step are added to that step's first tokens, not to the sequence's."""
    span = BlockSpan(2, 3)
    hidden = states(1, 12)
    prompts = torch.full((1, 1, 2, hidden.shape[2]), 0.5)
    async with serving(llama) as engine, opened(engine, span) as session:
        first = await session.step(Step(hidden[:, :8], 0))
        second = await session.step(Step(hidden[:, 8:], 8, prompts=prompts))
    hidden[:, 8:10] += 0.5
    actual = torch.cat((first, second), dim=1)
    assert_close(actual, llama.expected(hidden, span).detach(), **TOLERANCE, what="second step")


@pytest.mark.parametrize("limits", [EngineLimits(), SMALL_BATCH], ids=["whole", "chunked"])
async def test_hypo_ids_reorder_rows(llama: TinyModel, limits: EngineLimits) -> None:
    """With hypo_ids each row continues from the row they name, in a beam search and before a prefill alike."""
    hidden = states(3, 24)
    orders = [(5, (2, 0, 0)), (6, (1, 1, 2)), (9, (0, 2, 1)), (24, (2, 2, 2))]
    history = hidden[:, :4]
    async with serving(llama, limits) as engine, opened(engine, batch=3) as session:
        await session.step(Step(history, 0))
        for end, order in orders:
            part = hidden[:, session.position : end]
            history = torch.cat((history[list(order)], part), dim=1)
            actual = await session.step(Step(part, session.position, hypo_ids=order))
            expected = llama.expected(history).detach()[:, -part.shape[1] :]
            assert_close(actual, expected, **TOLERANCE, what=f"after {order}")


async def test_rollback_forgets_what_came_after(llama: TinyModel) -> None:
    """A step from an earlier position continues from there; also to 0, and together with hypo_ids."""
    hidden, other = states(2, 30), states(2, 30, seed=1)
    async with serving(llama, SMALL_BATCH) as engine, opened(engine, batch=2) as session:
        await feed(session, hidden[:, :18], [15, 1, 1, 1])
        history = torch.cat((hidden[:, :7], other[:, :9]), dim=1)
        actual = await session.step(Step(other[:, :9], 7))
        assert session.position == 16
        assert_close(actual, llama.expected(history).detach()[:, 7:], **TOLERANCE, what="rollback to 7")
        history = torch.cat((history[[1, 1], :10], hidden[:, :1]), dim=1)
        actual = await session.step(Step(hidden[:, :1], 10, hypo_ids=(1, 1)))
        assert_close(actual, llama.expected(history).detach()[:, 10:], **TOLERANCE, what="with hypo_ids")
        actual = await session.step(Step(other, 0))
        assert_close(actual, llama.expected(other).detach(), **TOLERANCE, what="rollback to 0")


async def test_rolling_back_a_shared_prefix_leaves_the_other_rows_alone(llama: TinyModel) -> None:
    """Rows that came from one row by hypo_ids diverge without writing into each other, also after a rollback."""
    hidden = states(3, 20)
    async with serving(llama) as engine, opened(engine, batch=3) as session:
        await session.step(Step(hidden[:, :10], 0))
        await session.step(Step(hidden[:, 10:14], 10, hypo_ids=(0, 0, 0)))
        actual = await session.step(Step(hidden[:, 14:], 9))
    history = torch.cat((hidden[[0, 0, 0], :9], hidden[:, 14:]), dim=1)
    assert_close(actual, llama.expected(history).detach()[:, 9:], **TOLERANCE, what="diverged rows")


async def test_zero_token_steps(llama: TinyModel) -> None:
    """A step without tokens answers its own shape and computes nothing, but rolls back where it says so."""
    hidden = states(1, 8)
    async with serving(llama) as engine, opened(engine) as session:
        assert (await session.step(Step(hidden[:, :0], 0))).shape == (1, 0, hidden.shape[2])
        await session.step(Step(hidden, 0))
        iterations = engine.stats().iterations_total
        await session.step(Step(hidden[:, :0], 8))
        await session.step(Step(hidden[:, :0], 5))
        assert engine.stats().iterations_total == iterations
        assert session.position == 5
        actual = await session.step(Step(hidden[:, 5:], 5))
    assert_close(actual, llama.expected(hidden).detach()[:, 5:], **TOLERANCE, what="after the rollback")


async def test_session_fills_to_its_last_token(llama: TinyModel) -> None:
    """A session takes exactly max_tokens positions; a session of none is legal and takes zero-token steps only."""
    hidden = states(1, 9)
    async with serving(llama) as engine:
        async with opened(engine, max_tokens=9) as session:
            await feed(session, hidden, [4, 4, 1])
        async with opened(engine, max_tokens=0) as empty:
            assert (await empty.step(Step(hidden[:, :0], 0))).numel() == 0


async def test_other_float_dtypes_are_cast(llama: TinyModel) -> None:
    """States in another float dtype are cast to the model's, and answers come in the model's."""
    hidden = states(1, 6)
    async with serving(llama) as engine, opened(engine) as session:
        actual = await session.step(Step(hidden.bfloat16(), 0))
    assert actual.dtype is torch.float32
    expected = llama.expected(hidden.bfloat16().float()).detach()
    assert_close(actual, expected, **TOLERANCE, what="bfloat16 input")
