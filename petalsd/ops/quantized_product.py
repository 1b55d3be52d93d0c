"""Matrix products over int8 and int4 weights on a GPU, one at a time; imports Triton."""

from __future__ import annotations

import torch

from petalsd.ops.launching import ALIGNED_ELEMENTS
from petalsd.ops.linear import linear
from petalsd.ops.packed_weight import PackedWeight
from petalsd.ops.quantized_linear import quantized_linear
from petalsd.ops.split_workspace import Workspaces


class QuantizedProduct:
    """``packed_product.Product`` by the kernel of ``ops.quantized_linear``.

    ``workspaces`` are shared by all products of a device.
    """

    def __init__(self, weight: PackedWeight, workspaces: Workspaces) -> None:
        self._weight = weight
        self._workspaces = workspaces

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return linear(x, self._weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        whole = (
            rows.contiguous()
            if rows.shape[1] % ALIGNED_ELEMENTS == 0
            else _room(len(rows), rows.shape[1], x).copy_(rows)
        )
        out = _room(len(rows), self._weight.num_out, x)
        quantized_linear(whole, self._weight, bias, out, self._workspaces.current())
        return out.view(*x.shape[:-1], self._weight.num_out)


def _room(rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """``[rows, width]``, undefined; each row begins where kernels want it, whatever the width."""
    return like.new_empty(rows, -(-width // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS)[:, :width]
