"""The gated experts of a sparse layer over the few tokens of a step on a GPU: the host decides on no launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from petalsd.ops.expert_gate import ClampedGate, Gate
from petalsd.ops.expert_linear import block_rows, expert_linear, quantized_expert_linear
from petalsd.ops.expert_order import ExpertOrder, order_experts, sum_experts
from petalsd.ops.gated_activation import clamped_activation, gated_activation
from petalsd.ops.launching import ALIGNED_ELEMENTS
from petalsd.ops.packed_weight import PackedWeight
from petalsd.ops.quantized_product import QuantizedProduct
from petalsd.ops.split_workspace import Workspaces


class ExpertProducts(Protocol):
    """Products of one projection of all experts."""

    def multiply(self, x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        """``[P, num_out]`` of x ``[R, num_in]``, as ``ops.expert_linear`` says."""


class DenseExperts:
    """By weights ``[E, num_out, num_in]`` in the dtype of states, biases ``[E, num_out]``; they are not copied."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, workspaces: Workspaces) -> None:
        self._weight = weight
        self._bias = bias
        self._workspaces = workspaces

    def multiply(self, x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        out = x.new_empty(len(order.order), self._weight.shape[1])
        expert_linear(x, self._weight, self._bias, order, out, self._workspaces.current())
        return out


class QuantizedExperts:
    """By an int8 or int4 weight that has the outputs of all experts, one below the other.

    bias      ``[num_experts, num_out]``
    products  of each expert by itself, over the same storage
    """

    def __init__(
        self, weight: PackedWeight, num_experts: int, bias: torch.Tensor | None, workspaces: Workspaces
    ) -> None:
        self._weight = weight
        self._bias = bias
        self._num_out = weight.num_out // num_experts
        self._workspaces = workspaces
        parts = (
            weight.outputs(first, first + self._num_out) for first in range(0, weight.num_out, self._num_out)
        )
        self.products: Sequence[QuantizedProduct] = [QuantizedProduct(part, workspaces) for part in parts]

    def multiply(self, x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        out = x.new_empty(len(order.order), self._num_out)
        quantized_expert_linear(x, self._weight, self._bias, order, out, self._workspaces.current())
        return out


class ExpertMlp:
    """Computes ``down(gate(gate_up(hidden)))`` of each token's experts, and their weighted sum.

    gate  ``silu_gate``, ``clamped_gate``, or one by torch
    """

    def __init__(
        self,
        num_experts: int,
        gate_up: ExpertProducts,
        down: ExpertProducts,
        gate: Gate,
    ) -> None:
        self._num_experts = num_experts
        self._gate_up = gate_up
        self._down = down
        self._gate = gate

    def multiply(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden ``[T, M]``; each token's experts and their weights ``[T, k]``; returns ``[T, M]``. No gradients.

        A token's result does not depend on other tokens, whatever they hold.
        """
        rows = block_rows(len(hidden), hidden.dtype)
        order = order_experts(top_k_index.contiguous(), self._num_experts, rows)
        states = self._gate(self._gate_up.multiply(hidden.contiguous(), order))
        states = self._down.multiply(states, order)
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        sum_experts(states, top_k_weights.contiguous(), out)
        return out


def silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    """That of SiLU in one launch."""
    out = _half(gate_up)
    gated_activation(gate_up, out, "silu")
    return out


def clamped_gate(gate: ClampedGate) -> Gate:
    """The same in one launch."""
    return partial(_gated, gate)


def _gated(gate: ClampedGate, gate_up: torch.Tensor) -> torch.Tensor:
    out = _half(gate_up)
    clamped_activation(gate_up, out, gate)
    return out


def _half(gate_up: torch.Tensor) -> torch.Tensor:
    """Undefined, half as wide."""
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


def fits_kernels(gate_up_shape: Sequence[int]) -> bool:
    """Whether experts of ``gate_up [E, 2 * I, M]`` can be computed so: rows of states and outputs are aligned."""
    _, num_gate_up, num_in = gate_up_shape
    return num_gate_up % (2 * ALIGNED_ELEMENTS) == 0 and num_in % ALIGNED_ELEMENTS == 0
