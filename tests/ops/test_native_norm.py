"""Norms by the CPU's kernels."""

from __future__ import annotations

import pytest
import torch

from petalsd import _C
from petalsd.ops.native_norm import NativeNorm
from petalsd.ops.norm import rms_norm
from tests.numeric import assert_close

EPS = 1e-5
WIDTHS = [1, 7, 64, 577]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", [1, 3, 400])
def test_rows_are_normed_each_by_itself(width: int, num_rows: int, dtype: torch.dtype) -> None:
    """Also many, which several threads take; in float32 until the result is rounded."""
    x, weight = drawn(num_rows, width).to(dtype), drawn(width)
    normed = NativeNorm(weight, EPS, _C.LayerTeam(3, "auto")).normalize(x)
    expected = rms_norm(x.float(), weight, EPS)
    bound = 1e-5 if dtype == torch.float32 else 2**-8
    assert normed.dtype == dtype
    assert_close(normed.float(), expected, bound, bound, "norm")
    alone = NativeNorm(weight, EPS, _C.LayerTeam(1, "auto")).normalize(x[-1:])
    assert torch.equal(normed[-1:], alone)


def test_heads_of_any_layout() -> None:
    """As attention has them: rows within rows, not beside each other; and none."""
    heads, norm = (
        drawn(2, 5, 96)[..., :64].unflatten(-1, (4, 16)),
        NativeNorm(drawn(16), EPS, _C.LayerTeam(1, "auto")),
    )
    assert torch.equal(norm.normalize(heads), norm.normalize(heads.contiguous()))
    assert norm.normalize(heads[:0]).shape == (0, 5, 4, 16)


def test_what_does_not_fit_is_refused() -> None:
    norm = NativeNorm(drawn(16), EPS, _C.LayerTeam(1, "auto"))
    with pytest.raises(ValueError, match="x has 8 values in a row, the norm has 16"):
        norm.normalize(drawn(4, 8))
    with pytest.raises(ValueError, match=r"rows of torch\.float16"):
        norm.normalize(drawn(4, 16).half())
