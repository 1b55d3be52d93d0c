"""The matrix product of every projection."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.nn import functional

from petalsd.ops.low_rank import LowRankWeight
from petalsd.ops.packed_weight import PackedWeight

Weight: TypeAlias = torch.Tensor | PackedWeight | LowRankWeight

_FEW_ROWS = range(2, 65)
_AT_ONCE = 1 << 20
_AT_ONCE_BY_GPU = 1 << 25


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``; x ``[..., in]``, weight ``[out, in]``, bias ``[out]``; differentiable.

    A packed weight is unpacked in the dtype of x for the duration of the call, some outputs after the other, and
    again for the gradient of x; it has no gradient itself, nor has a bias beside it.
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
        out = x.new_empty(len(x), weight.num_out)
        for outputs, values in weight.unpack_parts(x.dtype, _unpacked_at_once(weight)):
            if bias is None:
                torch.mm(x, values.t(), out=out[:, outputs])
            else:
                torch.addmm(bias[outputs], x, values.t(), out=out[:, outputs])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Parts are added up in float32, whatever they are computed in."""
        (grad,), weight = grads, ctx.weight
        total = grad.new_zeros(len(grad), weight.num_in, dtype=torch.float32)
        for outputs, values in weight.unpack_parts(grad.dtype, _unpacked_at_once(weight)):
            if grad.dtype == torch.float32:
                total.addmm_(grad[:, outputs], values)
            else:
                total += grad[:, outputs] @ values
        return total.to(grad.dtype), None, None


def _unpacked_at_once(weight: PackedWeight) -> int:
    """Values: a few MB stay in the caches of a processor; a GPU gets what fills it."""
    return _AT_ONCE if weight.device.type == "cpu" else _AT_ONCE_BY_GPU


def _dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """For a few rows in float32 on the CPU the product is computed as ``(weight @ x.T).T``: BLAS splits the long
    side over threads only when it is the first, which makes 8 rows up to 2.5 times as fast. The result is then a
    transposed view.
    """
    if x.dim() == 2 and x.shape[0] in _FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu":
        product = torch.mm(weight, x.t()).t()
        return product if bias is None else product + bias
    return functional.linear(x, weight, bias)
