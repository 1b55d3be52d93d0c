"""Sparse layers on a real GPU: steps by kernels equal transformers' experts, and can be captured as graphs."""

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


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03), ("float16", 0.01)])
def test_steps_are_right_and_can_be_captured(dtype: str, tolerance: float) -> None:
    """For each family, in 16 bits or float32, int8 and int4; and on two streams at once."""
    found = run_compiled("tests.gpu.experts", dtype, timeout_s=290)
    wrong = {
        name: outcome
        for name, outcome in found["families"].items()
        if not outcome["error"] <= tolerance or not outcome["is_replayed"]
    }
    assert found["families"] and found["is_apart"]
    assert not wrong, json.dumps(wrong, indent=1)
