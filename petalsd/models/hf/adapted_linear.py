"""Puts an adapter's low-rank terms beside linear modules of a layer, in a copy that shares everything else."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from petalsd.ops.low_rank import LowRankUpdate


class AdaptedLinear(nn.Module):
    """Stands for ``base``, a linear module, packed or not."""

    def __init__(self, base: nn.Module, update: LowRankUpdate) -> None:
        super().__init__()
        self.base = base
        self.update = update

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.update.add_to(self.base(x), x)


def adapt_layer(layer: nn.Module, updates: Mapping[str, LowRankUpdate]) -> nn.Module:
    """A copy of ``layer`` with these linear modules adapted, by their names in it; all tensors are shared."""
    adapted = _shallow_copy(layer)
    copies = {"": adapted}
    for name, update in updates.items():
        parent_name, _, child_name = name.rpartition(".")
        parent = _copied(parent_name, copies)
        parent.add_module(child_name, AdaptedLinear(parent.get_submodule(child_name), update))
    return adapted


def _copied(name: str, copies: dict[str, nn.Module]) -> nn.Module:
    """The module of this name in the copy, itself copied; ``copies`` has those that are already."""
    if name not in copies:
        parent_name, _, child_name = name.rpartition(".")
        parent = _copied(parent_name, copies)
        copies[name] = _shallow_copy(parent.get_submodule(child_name))
        parent.add_module(child_name, copies[name])
    return copies[name]


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Other modules can be put into the copy; the tensors are the same."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
