"""LoRA adapters on a real GPU: adapted blocks of every rung equal those of models with merged weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.adapters", dtype, quantization],
        env=environment, capture_output=True, text=True, timeout=290, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    wrong = {
        name: errors
        for name, errors in found.items()
        if max(errors["whole"], errors["steps"]) > tolerance or errors["without"] < 1.5 * tolerance
    }
    assert found
    assert not wrong, json.dumps(wrong, indent=1)
