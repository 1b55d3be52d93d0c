"""Norm, rotation and matrix product against transformers and plain formulas."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from petalsd.ops.linear import linear
from petalsd.ops.norm import rms_norm
from petalsd.ops.rotary import apply_rope
from tests.numeric import assert_close


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_bit_equal_to_transformers(dtype: torch.dtype) -> None:
    """For every dtype the result has the same bits as LlamaRMSNorm's."""
    x, weight = (torch.randn(33, 576) * 3).to(dtype), torch.rand(576).to(dtype)
    reference = LlamaRMSNorm(576, eps=1e-5).to(dtype)
    reference.weight.data.copy_(weight)
    assert torch.equal(rms_norm(x, weight, 1e-5), reference(x))


def test_rope_equals_transformers() -> None:
    """Rotating q and k as one tensor equals transformers' rotation of each."""
    q, k = torch.randn(7, 6, 16), torch.randn(7, 2, 16)
    angles = torch.randn(7, 8).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    rotated = apply_rope(torch.cat((q, k), dim=1), cos, sin)
    assert_close(rotated[:, :6], expected[0][0].transpose(0, 1), 1e-6, 1e-6, "q")
    assert_close(rotated[:, 6:], expected[1][0].transpose(0, 1), 1e-6, 1e-6, "k")


@pytest.mark.parametrize("shape", [(1, 48), (2, 48), (8, 48), (64, 48), (65, 48), (2, 5, 48)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_the_same_for_every_number_of_rows(shape: tuple[int, ...], has_bias: bool) -> None:
    """However it is computed, it is ``x @ weight.T + bias``."""
    x, weight = torch.randn(shape), torch.randn(40, 48)
    bias = torch.randn(40) if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_close(linear(x, weight, bias), expected, 1e-5, 1e-5, f"linear of {shape}")
