"""Residual and norm in one kernel, against the modules of transformers and the plain reference."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from petalsd.ops.add_norm import add_norm, reference_add_norm
from petalsd.ops.norm import Norm
from tests.numeric import assert_close

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
EPS = 1e-5


def norm_of(kind: str, width: int, dtype: torch.dtype) -> tuple[Norm, torch.nn.Module]:
    """A norm with random weights, and the module that computes it in float32."""
    modules = {"llama": LlamaRMSNorm, "gemma": GemmaRMSNorm, "layer": torch.nn.LayerNorm}
    module = modules[kind](width, eps=EPS)
    torch.nn.init.normal_(module.weight)
    module.to(dtype).float()
    bias = None
    if kind == "layer":
        torch.nn.init.normal_(module.bias)
        bias = module.bias.detach().to(dtype)
    weight = module.weight.detach().to(dtype)
    return Norm(weight, EPS, 1.0 if kind == "gemma" else 0.0, bias, kind == "layer"), module


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("kind", "width", "has_x"),
    [
        ("llama", 576, True),
        ("llama", 64, False),
        ("gemma", 80, True),
        ("layer", 576, True),
        ("layer", 96, False),
    ],
)
def test_it_is_the_norm_of_the_sum(kind: str, width: int, has_x: bool, dtype: torch.dtype) -> None:
    """Residual and result are those of transformers, for widths that fill the kernel's block and that don't."""
    norm, module = norm_of(kind, width, dtype)
    x = torch.randn(3, width).to(dtype) if has_x else None
    residual = (torch.randn(3, width) * 3 + 1).to(dtype)
    total = residual if x is None else residual + x
    out = torch.full((3, width), float("nan"), dtype=dtype)
    expected_residual, expected_out = reference_add_norm(x, residual, norm)
    add_norm(x, residual, norm, out)
    assert torch.equal(residual, total)
    tolerance = TOLERANCE[dtype]
    assert_close(out, module(total.float()), tolerance, tolerance, kind)
    assert_close(out, expected_out, tolerance, tolerance, f"{kind}, reference")
    assert torch.equal(residual, expected_residual)


def test_half_precision_is_rounded_where_transformers_rounds() -> None:
    """In float16 all but a few last bits are LlamaRMSNorm's own."""
    norm, module = norm_of("llama", 576, torch.float16)
    residual, out = torch.randn(8, 576).half(), torch.empty(8, 576).half()
    add_norm(None, residual, norm, out)
    expected = module.half()(residual)
    assert (out != expected).float().mean() < 0.01


def test_rows_may_lie_apart_and_nothing_beside_them_is_touched() -> None:
    """Rows of wider tensors are read and written in place."""
    norm, _ = norm_of("llama", 48, torch.float32)
    x, residual, out = (torch.full((4, 64), 7.0) for _ in range(3))
    x[:, :48], residual[:, :48] = torch.randn(4, 48), torch.randn(4, 48)
    expected_residual, expected = reference_add_norm(x[:, :48], residual[:, :48], norm)
    add_norm(x[:, :48], residual[:, :48], norm, out[:, :48])
    assert_close(out[:, :48], expected, 1e-5, 1e-5, "out")
    assert torch.equal(residual[:, :48], expected_residual)
    assert (residual[:, 48:] == 7).all() and (out[:, 48:] == 7).all()
