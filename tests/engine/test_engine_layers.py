"""Families without a fused block in the engine: sessions, sub-ranges, rollbacks, passes; against transformers."""

from __future__ import annotations

import asyncio

import pytest
import torch

from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import PassRequest, Step
from petalsd.models.ladder import Rung
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel, feed, opened, serving, states
from tests.numeric import assert_close
from tests.tiny_models import LAYER_VARIANTS

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
SMALL_BATCH = EngineLimits(max_batch_tokens=16, prefill_chunk_tokens=8)
VARIANTS = ["bloom", "falcon", "falcon-alibi", "falcon-new", "gemma2", "gemma3_text", "mixtral"]


@pytest.fixture(params=VARIANTS, scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    family, overrides = LAYER_VARIANTS[request.param]
    return TinyModel(tmp_path_factory.mktemp("model"), family, **overrides)


async def test_sessions_of_all_shapes_run_together(model: TinyModel) -> None:
    """Sessions of different sub-ranges, batch sizes and lengths, prefills in chunks, over packed weights."""
    assert {choice.taken.rung for choice in model.choices.values()} == {Rung.PACKED}
    shapes = [
        (BlockSpan(0, 4), 1, [7, 1, 1, 1]),
        (BlockSpan(0, 2), 3, [5, 1, 2, 1]),
        (BlockSpan(1, 3), 2, [1, 1, 1, 9]),
        (BlockSpan(3, 4), 1, [40, 1]),
    ]
    inputs = [states(batch, sum(chunks), seed) for seed, (_, batch, chunks) in enumerate(shapes)]
    async with serving(model, SMALL_BATCH) as engine:

        async def run(number: int) -> torch.Tensor:
            span, batch, chunks = shapes[number]
            async with opened(engine, span, batch, peer=f"peer-{number}") as session:
                return await feed(session, inputs[number], chunks)

        answers = await asyncio.gather(*(run(number) for number in range(len(shapes))))
    for (span, batch, _), hidden, actual in zip(shapes, inputs, answers, strict=True):
        assert_close(actual, model.expected(hidden, span).detach(), **TOLERANCE, what=f"{span} x {batch}")


async def test_rollback_and_reordered_rows(model: TinyModel) -> None:
    """A step from an earlier position continues from there; with hypo_ids each row from the one they name."""
    hidden, other = states(2, 30), states(2, 30, seed=1)
    async with serving(model) as engine, opened(engine, batch=2) as session:
        await feed(session, hidden[:, :18], [15, 1, 1, 1])
        actual = await session.step(Step(other[:, :9], 7))
        history = torch.cat((hidden[:, :7], other[:, :9]), dim=1)
        assert_close(actual, model.expected(history).detach()[:, 7:], **TOLERANCE, what="rollback to 7")
        actual = await session.step(Step(hidden[:, :1], 10, hypo_ids=(1, 1)))
        history = torch.cat((history[[1, 1], :10], hidden[:, :1]), dim=1)
        assert_close(actual, model.expected(history).detach()[:, 10:], **TOLERANCE, what="with hypo_ids")


async def test_passes_equal_transformers(model: TinyModel) -> None:
    """Forward and backward passes through a part of the span."""
    span, hidden, grad_output = BlockSpan(1, 4), states(2, 20), states(2, 20, seed=1)
    entering = hidden.clone().requires_grad_()
    expected = model.expected(entering, span)
    (expected_grad,) = torch.autograd.grad(expected, entering, grad_output)
    async with serving(model) as engine:
        output = await engine.forward(PassRequest(span, hidden, "peer"))
        gradient, of_prompts = await engine.backward(
            PassRequest(span, hidden, "peer", grad_output=grad_output)
        )
    assert of_prompts is None
    assert_close(output, expected.detach(), **TOLERANCE, what="forward")
    scale = max(1.0, float(expected_grad.abs().max()))
    assert_close(gradient, expected_grad, 1e-4 * scale, 1e-4, "backward")


async def test_chunks_use_the_frequencies_of_the_whole_step(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With length-dependent angles a chunked prefill uses the step's length, as transformers does."""
    family, overrides = LAYER_VARIANTS["phi3-longrope"]
    grown = TinyModel(tmp_path_factory.mktemp("grown"), family, **overrides)
    hidden = states(1, 48)
    async with serving(grown, SMALL_BATCH) as engine, opened(engine) as session:
        actual = await feed(session, hidden, [48])
    assert_close(actual, grown.expected(hidden).detach(), **TOLERANCE, what="longrope")
