"""gpt-oss's experts: with biases, an activation of their own, and gate and up by turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from petalsd.errors import ModelError
from petalsd.models.hf.family import ExpertNames
from petalsd.models.hf.packing import PackedExperts
from petalsd.models.hf.parts import Mxfp4Part, Part, RowsPart, Shape, SlicePart
from petalsd.ops.mxfp4 import VALUES_PER_BLOCK

MXFP4 = "mxfp4"
_STACKS = {"gate_ups": "gate_up_proj", "downs": "down_proj"}


class BiasedExperts(PackedExperts):
    """Stands for transformers' ``GptOssExperts``, packed or not.

    Each expert has linear modules, which are packed, and count their bytes, like any others. What is known of
    packed experts holds here as well: a step waits for the host, which sends tokens to them.
    """

    def __init__(self, experts: Any) -> None:
        """``experts`` is transformers' module, on the meta device."""
        nn.Module.__init__(self)
        hidden, inner, count = experts.hidden_size, experts.intermediate_size, experts.num_experts
        self.alpha, self.limit = experts.alpha, experts.limit
        self.gate_ups = nn.ModuleList(nn.Linear(hidden, 2 * inner, device="meta") for _ in range(count))
        self.downs = nn.ModuleList(nn.Linear(inner, hidden, device="meta") for _ in range(count))

    @property
    def nbytes(self) -> int:
        return 0

    def through_expert(self, expert: int, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.downs[expert](self._activate(self.gate_ups[expert](states)))
        return out

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate = gate_up[..., ::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


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
        in_files, count, is_packed = f"{prefix}{self.in_files}.", hf.num_local_experts, is_mxfp4(hf)
        if inner in _STACKS.values() and is_packed:
            _, num_in, num_out = shape
            whole = (count, num_out, _checked(num_in, name))
            return [Mxfp4Part(in_files + inner, whole, at, is_plain=True) for at in range(count)]
        if "." not in inner:
            return [RowsPart((in_files + inner,), shape)]
        kind, number, field = inner.split(".")
        stack, at = in_files + _STACKS[kind], int(number)
        if field == "bias":
            return [SlicePart(f"{stack}_bias", (count, *shape), at)]
        num_out, num_in = shape
        if is_packed:
            return [Mxfp4Part(stack, (count, num_out, _checked(num_in, name)), at, is_plain=False)]
        return [SlicePart(stack, (count, num_in, num_out), at)]


def is_mxfp4(hf: Any) -> bool:
    """Whether the checkpoint's experts are, by transformers' config."""
    quantization = getattr(hf, "quantization_config", None)
    return isinstance(quantization, dict) and quantization.get("quant_method") == MXFP4


def _checked(num_in: int, name: str) -> int:
    if num_in % VALUES_PER_BLOCK:
        raise ModelError(f"{name} has rows of {num_in} values: MXFP4 has blocks of {VALUES_PER_BLOCK}")
    return num_in
