"""A run of blocks in one call gives what its blocks give one after the other, and what transformers gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petalsd.models.block import TransformerBlock
from petalsd.models.native_span import NativeSpan
from petalsd.models.paged_span import BlockByBlock, ChainedSpans, PagedBlock, PagedSpan
from petalsd.models.rope import Rope
from petalsd.models.source import ModelSource
from petalsd.models.spans import paged_span
from petalsd.models.weights import load_block
from petalsd.types import BlockSpan
from tests.models.test_block import CPU, VARIANTS, Case
from tests.models.test_native_span import TIERS, Stranger, has_tier
from tests.numeric import assert_close
from tests.paged_rows import PagedRows

WHOLE = BlockSpan(0, 3)  # what leaves the last of four blocks is normed away by transformers
SINGLES = [BlockSpan(i, i + 1) for i in WHOLE]
PARTS = [BlockSpan(0, 1), BlockSpan(1, 3), BlockSpan(2, 3), WHOLE]
LENGTHS = [0, 5, 20, 43]
STEPS = 4


@pytest.fixture(params=["llama", "llama-biases", "mistral", "qwen3-biases-window"], scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, overrides = VARIANTS[request.param]
    return Case(tmp_path_factory.mktemp("model"), family, overrides)


def decode(case: Case, blocks: list[TransformerBlock], runs: list[BlockSpan], by: PagedSpan) -> torch.Tensor:
    """Rows of LENGTHS prefilled by ``blocks``, then STEPS tokens each through ``runs`` by ``by``; ``[n, M]``."""
    first, dtype, rope = runs[0].start, blocks[0].dtype, blocks[0].rope
    inputs = case.states[first][0].to(dtype)
    rows = PagedRows(4, case.config.num_kv_heads, case.config.head_dim, page_tokens=8, dtype=dtype)
    ids = [rows.add_row() for _ in LENGTHS]
    plain = BlockByBlock({block.index: block for block in blocks})
    with torch.inference_mode():
        batch = rows.extend({row: length for row, length in zip(ids, LENGTHS, strict=True) if length})
        history = torch.cat([inputs[:length] for length in LENGTHS])
        whole = BlockSpan(first, runs[-1].end)
        plain.forward_paged(whole, history, rows.kv, batch, rope.cos_sin(batch.positions))
        answers = []
        for _ in range(STEPS):
            batch = rows.extend(dict.fromkeys(ids, 1))
            hidden, cos_sin = inputs[batch.positions], rope.cos_sin(batch.positions)
            for run in runs:
                hidden = by.forward_paged(run, hidden, rows.kv, batch, cos_sin)
            answers.append(hidden)
    return torch.cat(answers)


def by_transformers(case: Case, end: int) -> torch.Tensor:
    """What ``decode`` should give, when its last run ends before block ``end``."""
    positions = [length + step for step in range(STEPS) for length in LENGTHS]
    return case.states[end][0, positions]


def native(blocks: list[TransformerBlock], threads: int = 1, tier: str = "auto") -> PagedSpan:
    return paged_span({block.index: block for block in blocks}, threads, tier)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("run", PARTS, ids=str)
def test_one_call_equals_transformers(case: Case, run: BlockSpan, tier: str) -> None:
    """The whole span and any part of it, in every tier, give transformers' hidden states to 1e-4."""
    if not has_tier(tier):
        pytest.skip(f"this processor has no {tier}")
    actual = decode(case, case.blocks, [run], native(case.blocks, 2, tier))
    assert_close(actual, by_transformers(case, run.end), 1e-4, 1e-4, str(run))


def test_float32_does_not_depend_on_how_a_span_is_cut(case: Case) -> None:
    """Bit for bit: nothing is rounded at the border of a call either."""
    span = native(case.blocks)
    whole = decode(case, case.blocks, [WHOLE], span)
    for runs in ([BlockSpan(0, 2), BlockSpan(2, 3)], SINGLES):
        assert torch.equal(decode(case, case.blocks, runs, span), whole)


@pytest.mark.parametrize("tier", TIERS)
def test_bfloat16_is_rounded_less_in_one_call(case: Case, tier: str, tmp_path: Path) -> None:
    """With bfloat16 weights, a call is no farther from float32 arithmetic than torch, block by block."""
    if not has_tier(tier):
        pytest.skip(f"this processor has no {tier}")
    case.reference.save_pretrained(tmp_path)
    source, rope = ModelSource(str(tmp_path)), Rope(case.config, torch.bfloat16, CPU)
    blocks = [load_block(source, case.config, i, torch.bfloat16, CPU, rope=rope) for i in WHOLE]
    truth = by_transformers(case, WHOLE.end)

    def error(runs: list[BlockSpan], by: PagedSpan) -> float:
        return (decode(case, blocks, runs, by).float() - truth).abs().mean().item()

    plain = BlockByBlock({block.index: block for block in blocks})
    assert error([WHOLE], native(blocks, tier=tier)) <= error(SINGLES, plain)


def test_blocks_that_are_not_native_are_walked_in_between(case: Case) -> None:
    """A stranger between native blocks takes its turn, whatever part of the span is asked for."""
    blocks: dict[int, PagedBlock] = {0: case.blocks[0], 1: Stranger(), 2: case.blocks[2]}
    chained, plain = paged_span(blocks, num_threads=1), BlockByBlock(blocks)
    assert isinstance(chained, ChainedSpans)
    assert isinstance(paged_span({0: case.blocks[0]}, num_threads=1), NativeSpan)
    for run in (WHOLE, BlockSpan(0, 2), BlockSpan(1, 2), BlockSpan(2, 3)):
        actual = decode(case, case.blocks, [run], chained)
        assert_close(actual, decode(case, case.blocks, [run], plain), 1e-4, 1e-4, str(run))
