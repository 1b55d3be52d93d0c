"""Attention to long sequences in parts: the same numbers whoever computes them, in tiers, chunks and company."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from petalsd.models.native_span import NativeSpan
from tests.models.test_native_span import (
    HERE,
    SHAPES,
    TIERS,
    Run,
    by_torch,
    has_tier,
    make_block,
    make_native,
)
from tests.numeric import assert_close

PART = 1024
LENGTHS = [3, PART - 1, 2 * PART + 70]
WINDOWS: dict[str, dict[str, Any]] = {
    "all": {},
    "window-900": {"use_sliding_window": True, "sliding_window": 900, "max_window_layers": 0},
    "window-9": SHAPES["window-9"],
}


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    """Every tier that this processor has."""
    if not has_tier(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def make_run(block: Any, lengths: list[int] = LENGTHS, stored: torch.dtype | None = None) -> Run:
    """In pages of 64, so that all rows find room."""
    return Run(block, lengths, 64, stored)


@pytest.mark.parametrize("shape", WINDOWS)
def test_long_rows_equal_the_block(shape: str, tier: str) -> None:
    """Rows of a part and of several of them, computed whole and in parts, to 2e-5."""
    block = make_block(**WINDOWS[shape])
    expected = make_run(block).decode(by_torch(block))
    whole = make_run(block).decode(make_native(block, 1, tier))
    in_parts = make_run(block).decode(make_native(block, 4, tier))
    assert_close(whole, expected, 2e-5, 2e-5, shape)
    assert torch.equal(in_parts, whole)


@pytest.mark.parametrize("stored", [None, torch.int8])
@pytest.mark.parametrize("shape", ["all", "window-900"])
def test_a_long_row_does_not_depend_on_the_others(shape: str, stored: torch.dtype | None, tier: str) -> None:
    """Bit for bit: alone, where it is taken in parts, or in a batch, where it may be taken whole."""
    block = make_block(torch.bfloat16, **WINDOWS[shape])
    run = make_run(block, stored=stored)
    batched = run.decode(make_native(block, 1, tier))
    for row, length in enumerate(LENGTHS):
        batch = run.rows.extend({run.ids[row]: 0})
        batch = replace(batch, token_bounds=[0, 1], positions=torch.tensor([length]))
        with torch.inference_mode():
            alone = make_native(block, 3, tier).forward_paged(
                HERE, run.new[row : row + 1], run.rows.kv, batch, block.rope.cos_sin(batch.positions)
            )
        assert torch.equal(alone[0], batched[row]), f"row of {length}"


@pytest.mark.parametrize("shape", WINDOWS)
def test_chunks_of_a_long_prefill_are_the_prefill(shape: str, tier: str) -> None:
    """Bit for bit: in chunks that parts cut anywhere, and whose rows see different parts, or at once."""
    block = make_block(torch.bfloat16, **WINDOWS[shape])
    tokens = PART + 200
    states = torch.randn(tokens, block.config.hidden_size, generator=torch.Generator().manual_seed(5))
    whole = prefill_in_chunks(make_native(block, 1, tier), block, states, [tokens])
    for threads, sizes in ((3, [tokens]), (4, [PART - 5, 3, 1, 1, 1, 7, tokens - PART - 8])):
        chunks = prefill_in_chunks(make_native(block, threads, tier), block, states, sizes)
        assert torch.equal(chunks, whole)


def prefill_in_chunks(native: NativeSpan, block: Any, states: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """One row's states through the block, so many tokens at a time."""
    run, parts = make_run(block, [0]), []
    for part in states.to(block.dtype).split(sizes):
        batch = run.rows.extend({0: len(part)})
        with torch.inference_mode():
            cos_sin = block.rope.cos_sin(batch.positions)
            parts.append(native.forward_paged(HERE, part, run.rows.kv, batch, cos_sin))
    return torch.cat(parts)
