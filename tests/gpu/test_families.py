"""Every family that is served, on a real GPU: its blocks on their best rung equal transformers' layer."""

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
    pytest.mark.timeout(600),  # each kind of kernel is compiled once
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_rung_is_rejected(dtype: str, quantization: str) -> None:
    """What computes at all computes what it should, the best way of each family."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.families", dtype, quantization],
        env=environment, capture_output=True, text=True, timeout=590, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    wrong = {
        name: outcome
        for name, outcome in found.items()
        if "error" in outcome or not all(trial["is_passed"] for trial in outcome["trials"])
    }
    assert found
    assert not wrong, json.dumps(wrong, indent=1)
