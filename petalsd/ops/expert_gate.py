"""What the experts of sparse layers do with the product of gate and up, and what they add to their products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

Gate: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Makes ``[n, I]`` of ``[n, 2 * I]``, in each row the gate before the up."""


@dataclass(frozen=True, slots=True)
class ActivationGate:
    """``activation(gate) * up``."""

    activation: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up


@dataclass(frozen=True, slots=True)
class ClampedGate:
    """``(up + 1) * gate * sigmoid(alpha * gate)``, of a gate up to ``limit`` and an up within it on both sides."""

    limit: float
    alpha: float

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertBiases:
    """Of E experts: ``gate_up`` ``[E, 2 * I]`` and ``down`` ``[E, M]``."""

    gate_up: torch.Tensor
    down: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def of(self, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's, for gate and up and for down."""
        return self.gate_up[expert].to(dtype), self.down[expert].to(dtype)

    def float(self) -> ExpertBiases:
        """In float32 and contiguous; tensors that are, are not copied."""
        return ExpertBiases(self.gate_up.float().contiguous(), self.down.float().contiguous())
