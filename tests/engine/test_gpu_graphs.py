"""Captured steps on a real GPU; what ``recorded_graphs`` stands for elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.child import run_compiled

pytestmark = pytest.mark.gpu
BFLOAT16_STEP = 2.0**-7  # a product of another size may be summed in another order


MODELS = ["llama", "bloom", "falcon", "gemma2", "mixtral", "phi"]
"""One with fused blocks, and layers of transformers."""


@pytest.fixture(scope="module", params=MODELS)
def found(request: pytest.FixtureRequest) -> Any:
    """What ``gpu_graphs`` prints; it needs compiled kernels, and this process interprets them."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return {"model": request.param, **run_compiled("tests.engine.gpu_graphs", request.param, timeout_s=110)}


def test_steps_are_captured(found: Any) -> None:
    """Every block and the whole span for every bucket, and none of it reads memory that is gone."""
    assert found["failure"] is None
    assert found["num_graphs"] == 4 * 3
    assert found["bytes"] > 0


def test_a_replay_equals_a_step_that_is_launched(found: Any) -> None:
    """Up to what the padding changes in the products; and the answer reaches the host."""
    assert found["error"] <= BFLOAT16_STEP
    assert found["error_of_a_chain"] <= BFLOAT16_STEP
    assert found["arrives"]


def test_a_refused_capture_leaves_others_possible(found: Any) -> None:
    """The stream has left the capture, and the allocator knows it."""
    assert found["recovers"]


def test_capturing_again_takes_no_more_memory(found: Any) -> None:
    """Less than another workspace of cuBLAS; graphs that are gone have given theirs back."""
    assert found["growth"] < 4 << 20


def test_a_block_is_at_most_ten_launches(found: Any) -> None:
    """Counted in the captured graph; transformers' layers are some tens."""
    if found["model"] != "llama" or found["kernels"] is None:
        pytest.skip("layers of transformers, or the driver or its bindings cannot list a graph")
    assert len(found["kernels"]) <= 10
