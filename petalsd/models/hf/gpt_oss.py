"""gpt-oss's experts: with biases, an activation of their own, and in files gate and up by turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from petalsd.errors import ModelError
from petalsd.models.hf.family import ExpertNames
from petalsd.models.hf.packing import ExpertByExpert
from petalsd.models.hf.parts import Mxfp4Part, Part, RowOrder, RowsPart, Shape, SlicePart
from petalsd.ops.expert_gate import ClampedGate, ExpertBiases
from petalsd.ops.linear import linear
from petalsd.ops.mxfp4 import VALUES_PER_BLOCK

MXFP4 = "mxfp4"
_IN_FILES = {
    "gate_up": ("gate_up_proj", RowOrder.BY_TURNS),
    "gate_up_bias": ("gate_up_proj_bias", RowOrder.BY_TURNS),
    "down": ("down_proj", RowOrder.SAME),
    "down_bias": ("down_proj_bias", RowOrder.SAME),
}
"""What ``BiasedExperts`` has, and transformers, whose weights are called as in files. No name is in both."""


class BiasedExperts(ExpertByExpert):
    """Stands for transformers' ``GptOssExperts``, with weights as other experts have them.

    gate_up, gate_up_bias  ``[E, 2 * I, M]`` and ``[E, 2 * I]``, gate above up
    down, down_bias        ``[E, M, I]`` and ``[E, M]``
    """

    def __init__(self, experts: Any) -> None:
        """``experts`` is transformers' module, on the meta device."""
        super().__init__()
        hidden, inner, count = experts.hidden_size, experts.intermediate_size, experts.num_experts
        self.gate = ClampedGate(experts.limit, experts.alpha)
        self.gate_up = _parameter(count, 2 * inner, hidden)
        self.gate_up_bias = _parameter(count, 2 * inner)
        self.down = _parameter(count, hidden, inner)
        self.down_bias = _parameter(count, hidden)

    @property
    def gate_up_proj(self) -> torch.Tensor:
        """By the name that other experts have for it."""
        return self.gate_up

    @property
    def down_proj(self) -> torch.Tensor:
        return self.down

    @property
    def biases(self) -> ExpertBiases:
        return ExpertBiases(self.gate_up_bias, self.down_bias)

    def through_expert(self, expert: int, states: torch.Tensor) -> torch.Tensor:
        gated = self.gate(linear(states, self.gate_up[expert], self.gate_up_bias[expert]))
        return linear(gated, self.down[expert], self.down_bias[expert])


class GptOssExpertNames(ExpertNames):
    """Files hold all experts' weights in one tensor, ``[experts, in, out]``, or as ``Mxfp4Part`` has them."""

    def replace_in(self, layer: nn.Module) -> None:
        layer.set_submodule(self.module, BiasedExperts(layer.get_submodule(self.module)))

    def matrices(self, experts: Any) -> Iterator[torch.Tensor]:
        for stack in (experts.gate_up_proj, experts.down_proj):
            yield from stack.transpose(1, 2)

    def parts(self, hf: Any, prefix: str, name: str, shape: Shape) -> list[Part] | None:
        if not name.startswith(f"{self.module}."):
            return None
        inner = name.removeprefix(f"{self.module}.")
        in_files, is_packed = f"{prefix}{self.in_files}.", is_mxfp4(hf)
        if inner not in _IN_FILES:
            if not is_packed or len(shape) == 2:
                return [RowsPart((in_files + inner,), shape)]
            whole = shape[0], shape[2], _checked(shape[1], name)
            return [Mxfp4Part(in_files + inner, whole, at, RowOrder.TRANSPOSED) for at in range(shape[0])]
        spelling, order = _IN_FILES[inner]
        if is_packed and len(shape) == 3:
            whole = shape[0], shape[1], _checked(shape[2], name)
            return [Mxfp4Part(in_files + spelling, whole, at, order) for at in range(shape[0])]
        stored = shape[0], *shape[:0:-1]
        return [SlicePart(in_files + spelling, stored, at, order) for at in range(shape[0])]


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def is_mxfp4(hf: Any) -> bool:
    """Whether the checkpoint's experts are, by transformers' config."""
    quantization = getattr(hf, "quantization_config", None)
    return isinstance(quantization, dict) and quantization.get("quant_method") == MXFP4


def _checked(num_in: int, name: str) -> int:
    if num_in % VALUES_PER_BLOCK:
        raise ModelError(f"{name} has rows of {num_in} values: MXFP4 has blocks of {VALUES_PER_BLOCK}")
    return num_in
