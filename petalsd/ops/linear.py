"""The matrix product of every projection."""

from __future__ import annotations

import torch
from torch.nn import functional

_FEW_ROWS = range(2, 65)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``; x ``[..., in]``, weight ``[out, in]``, bias ``[out]``; differentiable.

    For a few rows in float32 on the CPU the product is computed as ``(weight @ x.T).T``: BLAS splits the long side
    over threads only when it is the first, which makes 8 rows up to 2.5 times as fast. The result is then a
    transposed view.
    """
    if x.dim() == 2 and x.shape[0] in _FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu":
        product = torch.mm(weight, x.t()).t()
        return product if bias is None else product + bias
    return functional.linear(x, weight, bias)
