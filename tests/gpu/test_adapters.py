"""LoRA adapters on a real GPU: adapted blocks of every rung equal those of models with merged weights."""

from __future__ import annotations

import json

import pytest
import torch

from tests.gpu.child import run_compiled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize(
    ("dtype", "quantization", "tolerance"),
    [
        ("float32", "none", 1e-3),
        ("bfloat16", "none", 0.05),
        ("bfloat16", "int8", 0.1),
        ("float16", "int4", 0.6),
    ],
)
def test_adapted_blocks_equal_merged_ones(dtype: str, quantization: str, tolerance: float) -> None:
    """Whole sequences and steps, as near as the rounding of the weights lets them; without it they are far."""
    found = run_compiled("tests.gpu.adapters", dtype, quantization, timeout_s=290)
    wrong = {
        name: errors
        for name, errors in found.items()
        if max(errors["whole"], errors["steps"]) > tolerance or errors["without"] < 1.5 * tolerance
    }
    assert found
    assert not wrong, json.dumps(wrong, indent=1)
