"""Matrix products over packed weights, one at a time: for layers that are not computed as a whole in C++."""

from __future__ import annotations

import torch

from petalsd import _C
from petalsd.ops.linear import linear
from petalsd.ops.native_weight import native_weight
from petalsd.ops.packed_weight import PackedWeight


class PackedProduct:
    """Products of one weight by the kernels of ``team``, which many products share; from any thread.

    With a gradient they are those of ``ops.linear``: the kernels round activations beside weights of a few bits.
    """

    def __init__(self, weight: PackedWeight, team: _C.LinearTeam) -> None:
        self._weight = weight
        self._native = native_weight(weight)
        self._team = team

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias``; x ``[..., in]``, bias ``[out]``; differentiable with respect to ``x``.

        Sums are float32, and rounded to the dtype of x once. ValueError for an x of another width.
        """
        if x.shape[-1] != self._weight.num_in:
            raise ValueError(f"x has {x.shape[-1]} inputs, the weight has {self._weight.num_in}")
        if torch.is_grad_enabled() and x.requires_grad:
            return linear(x, self._weight, bias)
        rows = x.float().contiguous()
        out = torch.empty(*x.shape[:-1], self._weight.num_out)
        num_rows = out.numel() // self._weight.num_out
        if num_rows:
            self._team.run(self._native, rows.data_ptr(), out.data_ptr(), num_rows)
        if bias is not None:
            out += bias
        return out.to(x.dtype)
