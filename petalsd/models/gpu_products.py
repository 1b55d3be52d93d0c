"""Products, norms and experts of layers by the kernels of a GPU; machines without one do not even import this."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from petalsd.models.hf.experts import KernelExperts, is_silu
from petalsd.models.hf.family import ExpertNames
from petalsd.models.hf.packing import ExpertByExpert, PackedExperts, biases_of, find_experts, gate_of
from petalsd.ops.expert_gate import ClampedGate, ExpertBiases, Gate
from petalsd.ops.expert_mlp import (
    DenseExperts,
    ExpertMlp,
    QuantizedExperts,
    clamped_gate,
    fits_kernels,
    silu_gate,
)
from petalsd.ops.norm import Norm
from petalsd.ops.packed_product import Product
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.quantized_product import QuantizedProduct
from petalsd.ops.row_norm import KernelNorm, fits_kernel
from petalsd.ops.split_workspace import StreamWorkspaces
from petalsd.ops.weight_packing import pack_stack, pack_weight

_USUAL_GATE = "_default_apply_gate"
"""transformers' name for what its experts have that do not gate in a way of their own."""


class GpuProducts:
    """Makes what computes with the weights of layers on ``device``."""

    tier = "triton"

    def __init__(self, device: torch.device, num_multiprocessors: int) -> None:
        self._device = device
        self._workspaces = StreamWorkspaces(device, num_multiprocessors)

    @classmethod
    def of(cls, device: torch.device) -> GpuProducts:
        return cls(device, torch.cuda.get_device_properties(device).multi_processor_count)

    def product(self, weight: PackedWeight) -> Product:
        """Of a weight on the device."""
        return QuantizedProduct(weight, self._workspaces)

    def norm(self, norm: Norm) -> KernelNorm | None:
        """None: of a width that the kernel cannot read."""
        return KernelNorm(norm) if fits_kernel(len(norm.weight)) else None

    def pack_experts(self, experts: Any, format: WeightFormat) -> nn.Module:
        """What stands for transformers' experts, over weights in an int8 or int4 format."""
        gate, biases = gate_of(experts), biases_of(experts)
        biases = None if biases is None else biases.float()
        stacks = experts.gate_up_proj, experts.down_proj
        if not fits_kernels(experts.gate_up_proj.shape):
            one_by_one = [[self._product_of(weight, format) for weight in stack] for stack in stacks]
            return PackedExperts(gate, one_by_one[0], one_by_one[1], biases)
        num_experts = len(experts.gate_up_proj)
        gate_up, down = (
            QuantizedExperts(pack_stack(stack, format, self._device), num_experts, bias, self._workspaces)
            for stack, bias in zip(stacks, _by_product(biases), strict=True)
        )
        whole = PackedExperts(gate, gate_up.products, down.products, biases)
        return KernelExperts(whole, ExpertMlp(num_experts, gate_up, down, _by_kernel(gate)))

    def _product_of(self, weight: torch.Tensor, format: WeightFormat) -> Product:
        return self.product(pack_weight(weight.cpu(), format).to(self._device))

    def replace_experts(self, layer: nn.Module, names: ExpertNames) -> None:
        """Have transformers' experts in a layer, if any, computed by kernels where those can."""
        experts = find_experts(layer, names)
        if experts is None or not _is_usual(experts) or not fits_kernels(experts.gate_up_proj.shape):
            return
        stacks = experts.gate_up_proj, experts.down_proj
        gate_up, down = (
            DenseExperts(stack, bias, self._workspaces)
            for stack, bias in zip(stacks, _by_product(biases_of(experts)), strict=True)
        )
        kernels = ExpertMlp(len(experts.gate_up_proj), gate_up, down, _by_kernel(gate_of(experts)))
        layer.set_submodule(names.module, KernelExperts(experts, kernels))


def _is_usual(experts: Any) -> bool:
    """Whether kernels compute it: ours, or rows of two weights, without biases, gated by an activation alone."""
    if isinstance(experts, ExpertByExpert):
        return True
    parameters = {name for name, _ in experts.named_parameters()}
    gate = getattr(experts, "_apply_gate", None)
    is_gated = gate is None or gate.__name__ == _USUAL_GATE
    is_transposed = getattr(experts, "is_transposed", False)
    return parameters == {"gate_up_proj", "down_proj"} and is_gated and not is_transposed


def _by_product(biases: ExpertBiases | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if biases is None else (biases.gate_up, biases.down)


def _by_kernel(gate: Gate) -> Gate:
    """In one launch where there is a kernel for it."""
    if isinstance(gate, ClampedGate):
        return clamped_gate(gate)
    return silu_gate if is_silu(gate) else gate
