"""Norms by themselves on a GPU, each in one launch."""

from __future__ import annotations

import torch

from petalsd.ops.add_norm import add_norm
from petalsd.ops.launching import ALIGNED_ELEMENTS
from petalsd.ops.norm import Norm


def fits_kernel(width: int) -> bool:
    """Whether rows of this width can be read in whole words."""
    return width % ALIGNED_ELEMENTS == 0


class KernelNorm:
    """``norm`` of rows by ``add_norm``'s kernel."""

    def __init__(self, norm: Norm) -> None:
        self._norm = norm

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[..., M]``; statistics are float32. ValueError unless rows start at multiples of 16 elements."""
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        if len(rows):
            add_norm(None, rows, self._norm, out)
        return out.view(x.shape)
