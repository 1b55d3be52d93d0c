"""Root-mean-square norms of a layer by one kernel each: transformers has seven operations for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch import nn

from petalsd.models.hf.stand_ins import StandIn
from petalsd.ops.norm import Norm, rms_norm

_SUFFIX = "RMSNorm"
_NAMES_OF_EPS = ("variance_epsilon", "eps")
_OFFSETS = (0.0, 1.0)
_TOLERANCE = 1e-5


class NormKernel(Protocol):
    """``ops.native_norm.NativeNorm``, or ``ops.row_norm.KernelNorm``, which machines with a GPU import."""

    def normalize(self, x: torch.Tensor) -> torch.Tensor: ...


MakeNorm: TypeAlias = Callable[[Norm], NormKernel | None]
"""None where no kernel computes it."""


class NormStandIn(StandIn):
    """A norm by a kernel; one with a gradient, or of another dtype than its weight, by transformers."""

    def __init__(self, whole: nn.Module, dtype: torch.dtype, kernel: NormKernel) -> None:
        super().__init__(whole)
        self._dtype = dtype
        self._kernel = kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., M]`` to the same."""
        if x.dtype != self._dtype or (torch.is_grad_enabled() and x.requires_grad):
            normed: torch.Tensor = self.whole(x)
            return normed
        return self._kernel.normalize(x)


def replace_norms(layer: nn.Module, make_norm: MakeNorm) -> None:
    """Put stand-ins for the norms of a layer into it, in place."""
    for name, module in list(layer.named_modules()):
        norm = find_norm(module)
        if norm is not None and (kernel := make_norm(norm)) is not None:
            layer.set_submodule(name, NormStandIn(module, norm.weight.dtype, kernel))


def find_norm(module: nn.Module) -> Norm | None:
    """What a module computes, if it is such a norm: seen in what it makes of one row."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in _NAMES_OF_EPS if hasattr(module, name)), None)
    if not type(module).__name__.endswith(_SUFFIX) or eps is None or not isinstance(weight, torch.Tensor):
        return None
    row = torch.linspace(-1.5, 2.0, weight.numel(), device=weight.device)[None]
    with torch.no_grad():
        expected = module(row).float()
        for offset in _OFFSETS:
            normed = rms_norm(row, weight.float() + offset, eps)
            if torch.allclose(normed, expected, _TOLERANCE, _TOLERANCE):
                return Norm(weight.detach(), eps, offset)
    return None
