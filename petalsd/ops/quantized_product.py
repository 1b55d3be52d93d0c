"""Matrix products over int8 and int4 weights on a GPU, one at a time; imports Triton."""

from __future__ import annotations

import torch

from petalsd.ops.linear import linear
from petalsd.ops.packed_weight import PackedWeight
from petalsd.ops.quantized_linear import SplitWorkspace, quantized_linear


class QuantizedProduct:
    """``packed_product.Product`` by the kernel of ``ops.quantized_linear``.

    ``workspace`` is shared by products that are computed one after the other.
    """

    def __init__(self, weight: PackedWeight, workspace: SplitWorkspace) -> None:
        self._weight = weight
        self._workspace = workspace

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return linear(x, self._weight, bias)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = x.new_empty(len(rows), self._weight.num_out)
        quantized_linear(rows, self._weight, bias, out, self._workspace)
        return out.view(*x.shape[:-1], self._weight.num_out)
