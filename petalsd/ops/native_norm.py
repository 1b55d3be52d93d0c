"""Root-mean-square norms on a CPU in one call, instead of seven operations of torch."""

from __future__ import annotations

import torch

from petalsd import _C
from petalsd.ops.layer_rows import layer_rows


class NativeNorm:
    """``weight * x / sqrt(mean(x^2) + eps)`` by the CPU's kernels on ``team``; from any thread.

    weight  ``[M]``, with whatever the model adds to it; a float32 copy is kept
    """

    def __init__(self, weight: torch.Tensor, eps: float, team: _C.LayerTeam) -> None:
        self._weight = weight.float().contiguous()
        self._norm = _C.RowNorm(self._weight.data_ptr(), len(self._weight), eps)
        self._team = team

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[..., M]`` float32 or bfloat16; float32 until the result is rounded, once."""
        if x.shape[-1] != len(self._weight):
            raise ValueError(f"x has {x.shape[-1]} values in a row, the norm has {len(self._weight)}")
        rows = x.contiguous()
        out = torch.empty_like(rows)
        if out.numel():
            self._team.normalize(self._norm, layer_rows(rows, out))
        return out
