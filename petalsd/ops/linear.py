"""The matrix product of every projection."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.nn import functional

from petalsd.ops.low_rank import LowRankWeight
from petalsd.ops.packed_weight import PackedWeight

Weight: TypeAlias = torch.Tensor | PackedWeight | LowRankWeight

_FEW_ROWS = range(2, 65)


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``; x ``[..., in]``, weight ``[out, in]``, bias ``[out]``; differentiable.

    A packed weight is unpacked in the dtype of x for the duration of the call, and again for the gradient of x; it
    has no gradient itself, nor has a bias beside it.
    """
    if isinstance(weight, LowRankWeight):
        return weight.multiply(x, bias)
    if isinstance(weight, PackedWeight):
        rows = x.reshape(-1, weight.num_in)
        product: torch.Tensor = _PackedLinear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
        return product.view(*x.shape[:-1], weight.num_out)
    return _dense_linear(x, weight, bias)


class _PackedLinear(torch.autograd.Function):
    """Keeps the packed weight for the backward pass: autograd would keep what was unpacked, of all blocks.

    For rows ``[R, in]``, whose product is no view: nobody could change one in place that comes from here.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return functional.linear(x, weight.unpack(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] @ ctx.weight.unpack(grads[0].dtype), None, None


def _dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """For a few rows in float32 on the CPU the product is computed as ``(weight @ x.T).T``: BLAS splits the long
    side over threads only when it is the first, which makes 8 rows up to 2.5 times as fast. The result is then a
    transposed view.
    """
    if x.dim() == 2 and x.shape[0] in _FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu":
        product = torch.mm(weight, x.t()).t()
        return product if bias is None else product + bias
    return functional.linear(x, weight, bias)
