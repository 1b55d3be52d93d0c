"""Every family that is served, on a real GPU: its blocks on their best rung equal transformers' layer."""

from __future__ import annotations

import json

import pytest
import torch

from tests.gpu.child import run_compiled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # each kind of kernel is compiled once
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_rung_is_rejected(dtype: str, quantization: str) -> None:
    """What computes at all computes what it should, the best way of each family."""
    found = run_compiled("tests.gpu.families", dtype, quantization, timeout_s=590)
    wrong = {
        name: outcome
        for name, outcome in found.items()
        if "error" in outcome or not all(trial["is_passed"] for trial in outcome["trials"])
    }
    assert found
    assert not wrong, json.dumps(wrong, indent=1)
