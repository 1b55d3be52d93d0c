"""Steps through real blocks: alone, together, chunked, rolled back, reordered; against transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from petalsd.engine.limits import EngineLimits
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
