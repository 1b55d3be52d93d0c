"""Paged prefill attention in Triton's interpreter against the float32 reference."""

from __future__ import annotations

import pytest
import torch

from petalsd.ops.eight_bit_kv import Float8KV, Int8KV
from tests.kernels.attention_rows import F16, F32, AttentionCase
from tests.tiers import nightly_except

# Contexts before the new tokens, and these: whole prompts and chunks, from and to the borders of pages and tiles,
# more than a tile of queries, rows that decode, and one that has nothing in this batch.
PREFIXES = (0, 0, 33, 10, 63, 130, 0, 4)
COUNTS = (1, 65, 1, 17, 1, 140, 64, 0)

CASES = {
    "one head each": AttentionCase(1, 2, 64, 16, 1, F32),
    "three heads, padded size, window": AttentionCase(3, 1, 80, 16, 1, F16, window=20),
    "soft-cap, wide pages": AttentionCase(4, 1, 128, 32, 1, F32, softcap=0.7),
    "sinks, padded size": AttentionCase(8, 1, 96, 16, 1, F32, has_sinks=True),
    "sixteen heads of 256": AttentionCase(16, 1, 256, 16, 1, F16, softcap=3.0, window=64),
    "biases by distance": AttentionCase(4, 1, 64, 16, 1, F32, alibi=torch.float32),
    "biases of rounded products": AttentionCase(3, 1, 128, 16, 1, F32, alibi=torch.bfloat16),
    "biases and window": AttentionCase(8, 1, 80, 32, 1, F16, window=33, alibi=torch.float32),
    "window of one": AttentionCase(1, 1, 256, 32, 1, F32, window=1, has_sinks=True),
    "many heads": AttentionCase(35, 1, 64, 16, 1, F16, window=100),
    "int8 pages, padded size": AttentionCase(4, 2, 80, 16, 1, F32, stored=Int8KV),
    "int8 pages, options": AttentionCase(8, 1, 64, 32, 1, F16, window=40, softcap=5.0, stored=Int8KV),
    "float8 pages": AttentionCase(4, 1, 128, 16, 1, F16, stored=Float8KV),
}


DAILY = (
    "three heads, padded size, window", "soft-cap, wide pages", "sinks, padded size", "biases and window",
    "int8 pages, options", "float8 pages",
)  # fmt: skip


@pytest.mark.parametrize("name", nightly_except(CASES, *DAILY))
def test_every_option_equals_the_reference(name: str) -> None:
    """Prompts, chunks and decodes in one launch; pages are shuffled, what is unwritten is NaN."""
    case = CASES[name]
    rows = case.rows()
    rows.append({row: count for row, count in enumerate(PREFIXES) if count})
    q, batch = rows.append(dict(enumerate(COUNTS)))
    rows.check_prefill(q, batch, case.rule())
