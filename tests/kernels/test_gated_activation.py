"""The MLP's gate against transformers' activations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from petalsd.models.block_config import ACTIVATIONS as SUPPORTED
from petalsd.ops.expert_gate import ClampedGate
from petalsd.ops.gated_activation import (
    ACTIVATIONS,
    clamped_activation,
    gated_activation,
    reference_gated_activation,
)
from tests.numeric import assert_close

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def test_every_activation_of_the_fused_families_is_there() -> None:
    """What a model may ask for is what the kernel computes."""
    assert set(ACTIVATIONS) == SUPPORTED


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", sorted(SUPPORTED))
@pytest.mark.parametrize("width", [48, 1536])
def test_it_is_transformers_activation(activation: str, width: int, dtype: torch.dtype) -> None:
    """Of small and of huge values, in rows of less and of more than one piece."""
    gate_up = (torch.randn(3, 2 * width) * 4).to(dtype)
    gate_up[0, :2] = torch.tensor([100.0, -100.0])
    out = torch.full((3, width), float("nan"), dtype=dtype)
    gated_activation(gate_up, out, activation)
    gate, up = gate_up.float().chunk(2, dim=-1)
    tolerance = TOLERANCE[dtype]
    assert_close(out, ACT2FN[activation](gate) * up, tolerance, tolerance, activation)
    assert_close(out, reference_gated_activation(gate_up, activation), tolerance, tolerance, "reference")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [48, 1536])
def test_clamped_it_is_the_gate_of_gpt_oss(width: int, dtype: torch.dtype) -> None:
    """Of values within the bounds, far outside of them, and of none at all, in both halves."""
    gate = ClampedGate(limit=7.0, alpha=1.702)
    gate_up = (torch.randn(4, 2 * width) * 6).to(dtype)
    gate_up[0, :2] = gate_up[0, width : width + 2] = torch.tensor([100.0, -100.0])
    gate_up[1, 0] = gate_up[2, width] = float("nan")
    out = torch.full((4, width), float("nan"), dtype=dtype)
    clamped_activation(gate_up, out, gate)
    assert out[1:3, 0].isnan().all() and out.isnan().sum() == 2
    actual, expected = out.float().nan_to_num(), gate(gate_up.float()).nan_to_num()
    scale = expected.abs().max()
    assert_close(actual / scale, expected / scale, TOLERANCE[dtype], TOLERANCE[dtype], "gate")
    stand_in = SimpleNamespace(limit=gate.limit, alpha=gate.alpha)
    woven = torch.stack(gate_up.float().chunk(2, dim=-1), dim=-1).flatten(1)
    theirs = GptOssExperts._apply_gate(stand_in, woven).nan_to_num()
    assert_close(expected, theirs, 1e-6, 1e-6, "transformers")


def test_rows_of_a_wider_tensor_keep_what_is_beside_them() -> None:
    """Only the rows' own columns are written, and a NaN stays in its row."""
    gate_up, out = torch.randn(3, 64), torch.full((3, 48), 7.0)
    gate_up[1] = float("nan")
    gated_activation(gate_up, out[:, :32], "relu")
    assert (out[:, 32:] == 7).all()
    assert out[1, :32].isnan().all() and not out[[0, 2]].isnan().any()


def test_an_unknown_activation_is_refused() -> None:
    """With the names of those that there are."""
    with pytest.raises(ValueError, match="activation = 'tanh': one of silu"):
        gated_activation(torch.zeros(1, 64), torch.zeros(1, 32), "tanh")
