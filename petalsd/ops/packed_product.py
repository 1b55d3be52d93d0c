"""Matrix products over packed weights, one at a time: for layers that are not computed as a whole."""

from __future__ import annotations

from typing import Protocol

import torch

from petalsd import _C
from petalsd.ops.layer_rows import layer_rows
from petalsd.ops.linear import linear
from petalsd.ops.packed_weight import PackedWeight, native_weight


class Product(Protocol):
    """Products of one packed weight. With a gradient they are those of ``ops.linear``."""

    @property
    def nbytes(self) -> int: ...

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias``; x ``[..., in]``, bias ``[out]``; differentiable with respect to ``x``.

        Sums are float32, and rounded to the dtype of x once. ValueError for an x of another width.
        """


class PackedProduct:
    """By the CPU's kernels on ``team``, which many products share; from any thread.

    The kernels round activations beside weights of a few bits, so what has a gradient does without them.
    """

    def __init__(self, weight: PackedWeight, team: _C.LayerTeam) -> None:
        self._weight = weight
        self.native = native_weight(weight)
        self._team = team

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    @property
    def num_out(self) -> int:
        return self._weight.num_out

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``Product`` has the contract; a float32 x is not rounded beside bfloat16 weights."""
        if x.shape[-1] != self._weight.num_in:
            raise ValueError(f"x has {x.shape[-1]} inputs, the weight has {self._weight.num_in}")
        if torch.is_grad_enabled() and x.requires_grad:
            return linear(x, self._weight, bias)
        rows = x.contiguous()
        out = rows.new_empty(*x.shape[:-1], self._weight.num_out)
        biases = None if bias is None else bias.float().contiguous()
        if out.numel():
            self._team.multiply(
                self.native, 0 if biases is None else biases.data_ptr(), layer_rows(rows, out)
            )
        return out
