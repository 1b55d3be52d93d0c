"""Paged decode attention in Triton's interpreter against the float32 reference."""

from __future__ import annotations

import pytest
import torch

from petalsd.ops.eight_bit_kv import Float8KV, Int8KV
from tests.kernels.attention_rows import F16, F32, AttentionCase

# One token, the borders of a page and of a tile, and enough for several splits.
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 300, 530)


# Each pair of group, head size, splits, dtype and option that can interact is in some case.
CASES = {
    "one head each": AttentionCase(1, 2, 64, 16, 1, F32),
    "three heads, padded size, window": AttentionCase(3, 1, 80, 16, 4, F16, window=20),
    "soft-cap, wide pages": AttentionCase(4, 1, 128, 32, 2, F32, softcap=0.7),
    "sinks, padded size": AttentionCase(8, 1, 96, 16, 8, F32, has_sinks=True),
    "sixteen heads of 256": AttentionCase(16, 1, 256, 16, 4, F16, softcap=3.0, window=64),
    "biases by distance": AttentionCase(4, 1, 64, 16, 4, F32, alibi=torch.float32),
    "biases of rounded products": AttentionCase(3, 1, 128, 16, 2, F32, alibi=torch.bfloat16),
    "biases and window": AttentionCase(8, 1, 80, 32, 1, F16, window=33, alibi=torch.float32),
    "sinks and window in one split": AttentionCase(1, 1, 256, 32, 1, F32, window=16, has_sinks=True),
    "sinks and soft-cap": AttentionCase(16, 1, 64, 16, 2, F16, softcap=2.0, has_sinks=True),
    "more heads than a tile has rows": AttentionCase(35, 1, 64, 16, 1, F16),
    "int8 pages, padded size": AttentionCase(4, 2, 80, 16, 4, F32, stored=Int8KV),
    "int8 pages, options": AttentionCase(8, 1, 64, 32, 1, F16, window=40, softcap=5.0, stored=Int8KV),
    "float8 pages": AttentionCase(4, 1, 128, 16, 4, F16, stored=Float8KV),
}


@pytest.mark.parametrize("name", CASES)
def test_every_option_equals_the_reference(name: str) -> None:
    """Rows of all lengths and two padding rows in one launch; pages are shuffled, what is unwritten is NaN."""
    case = CASES[name]
    rows = case.rows()
    rows.append({row: length - 1 for row, length in enumerate(LENGTHS) if length > 1})
    q, batch = rows.append(dict.fromkeys(range(len(LENGTHS)), 1))
    plan = rows.plan(len(LENGTHS) + 2, case.splits)
    out = rows.check_decode(q, batch, case.rule(), plan, padding=2)
    assert (out[-2:] == 0).all()
