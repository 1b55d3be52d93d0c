"""Experts of a sparse layer by kernels: on a GPU for the few tokens of decode steps, on a CPU for any."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from petalsd.models.hf.packing import ExpertByExpert
from petalsd.models.hf.stand_ins import StandIn
from petalsd.ops.expert_gate import ActivationGate, Gate

MAX_TOKENS = 64
"""That kernels of a GPU compute at once; more keep a device busy expert by expert."""


class FewTokens(Protocol):
    """``ops.native_experts.NativeExperts``, or ``ops.expert_mlp.ExpertMlp``, which machines with a GPU import."""

    def multiply(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor: ...


class KernelExperts(StandIn):
    """Stands for gated experts.

    whole    computes any number of tokens, and gradients, but asks the host which experts there are
    kernels  computes up to ``max_tokens`` over the same weights, and does not
    """

    is_capturable = True
    """A step of up to ``max_tokens`` tokens without gradients never waits for the host."""

    def __init__(self, whole: nn.Module, kernels: FewTokens, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__(whole)
        self._kernels = kernels
        self._max_tokens = max_tokens

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden ``[T, M]``; the experts of each token and their weights ``[T, k]``; returns ``[T, M]``."""
        has_gradient = torch.is_grad_enabled() and (hidden.requires_grad or top_k_weights.requires_grad)
        if len(hidden) > self._max_tokens or has_gradient:
            states: torch.Tensor = self.whole(hidden, top_k_index, top_k_weights)
            return states
        return self._kernels.multiply(hidden, top_k_index, top_k_weights)


def is_silu(gate: Gate) -> bool:
    """Whether a gate is that of SiLU."""
    from transformers.activations import ACT2FN  # late: comes with a lot, which other families do without

    silus = (nn.SiLU, *map(type, (ACT2FN["silu"], ACT2FN["swish"])))
    return isinstance(gate, ActivationGate) and isinstance(gate.activation, silus)


def experts_are_capturable(layer: nn.Module) -> bool:
    """Whether all experts in a layer are ``KernelExperts``: also true where there are none."""
    if isinstance(layer, KernelExperts):
        return layer.is_capturable
    return not _holds_experts(layer) and all(map(experts_are_capturable, layer.children()))


def _holds_experts(module: nn.Module) -> bool:
    """Ours, or those of transformers: a parameter of three dimensions is one matrix for each expert."""
    stacks = (parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    return isinstance(module, ExpertByExpert) or any(stacks)
