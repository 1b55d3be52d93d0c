"""Products, norms, attention and experts of layers by the kernels of a CPU."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from petalsd import _C
from petalsd.models.hf.experts import KernelExperts, is_silu
from petalsd.models.hf.family import ExpertNames
from petalsd.models.hf.packing import PackedExperts, biases_of, gate_of
from petalsd.ops.expert_gate import ClampedGate
from petalsd.ops.native_experts import NativeExperts
from petalsd.ops.native_norm import NativeNorm
from petalsd.ops.norm import Norm
from petalsd.ops.packed_product import PackedProduct
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.weight_packing import pack_weight


class CpuProducts:
    """Makes what computes with the weights of layers. ``team`` computes it all, one after the other."""

    def __init__(self, num_threads: int) -> None:
        self.team = _C.LayerTeam(num_threads, "auto")

    @property
    def tier(self) -> str:
        return self.team.tier

    def product(self, weight: PackedWeight) -> PackedProduct:
        return PackedProduct(weight, self.team)

    def norm(self, norm: Norm) -> NativeNorm | None:
        """None: of a dtype that these kernels lack."""
        if norm.weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        return NativeNorm(norm.weight.float() + norm.offset, norm.eps, self.team)

    def pack_experts(self, experts: Any, format: WeightFormat) -> nn.Module:
        """What stands for transformers' experts, over weights in a format."""
        gate_up, down = (
            [self.product(pack_weight(weight, format)) for weight in stack]
            for stack in (experts.gate_up_proj, experts.down_proj)
        )
        gate, biases = gate_of(experts), biases_of(experts)
        biases = None if biases is None else biases.float()
        whole = PackedExperts(gate, gate_up, down, biases)
        clamped = gate if isinstance(gate, ClampedGate) else None
        if clamped is None and not is_silu(gate):
            return whole
        kernels = NativeExperts(gate_up, down, self.team, clamped, biases)
        return KernelExperts(whole, kernels, max_tokens=sys.maxsize)

    def replace_experts(self, layer: nn.Module, names: ExpertNames) -> None:
        """Nothing: where weights are not packed, transformers computes experts."""
