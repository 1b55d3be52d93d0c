"""Replaces the linear modules of a layer by ones over packed weights; each plain weight goes as its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from petalsd.models.hf.family import ExpertNames, packable_linears
from petalsd.ops.expert_gate import ActivationGate, ClampedGate, ExpertBiases, Gate
from petalsd.ops.packed_product import Product
from petalsd.ops.packed_weight import WeightFormat
from petalsd.ops.weight_packing import pack_weight

MakeProduct: TypeAlias = Callable[[torch.Tensor], Product]
"""Packs a weight ``[out, in]``, which it does not keep."""
PackExperts: TypeAlias = Callable[[Any], nn.Module]
"""Makes what stands for transformers' experts, of which it keeps no weights."""


class PackedLinear(nn.Module):
    """Stands for an ``nn.Linear``."""

    def __init__(self, linear: nn.Linear, make_product: MakeProduct) -> None:
        super().__init__()
        self.product = make_product(linear.weight)
        self.bias = linear.bias

    @property
    def nbytes(self) -> int:
        return self.product.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.multiply(x, self.bias)


class ExpertByExpert(nn.Module):
    """Stands for the experts of a sparse MLP; asks the host which of them there are tokens for."""

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden ``[T, M]``; the experts of each token and their weights ``[T, k]``; returns ``[T, M]``."""
        out = torch.zeros_like(hidden)
        for expert in torch.unique(top_k_index).tolist():
            tokens, places = torch.where(top_k_index == expert)
            states = self.through_expert(expert, hidden[tokens])
            weighted = states * top_k_weights[tokens, places, None]
            out = out.index_add(0, tokens, weighted.to(out.dtype))
        return out

    def through_expert(self, expert: int, states: torch.Tensor) -> torch.Tensor:
        """``[n, M]`` of its tokens to ``[n, M]``."""
        raise NotImplementedError


class PackedExperts(ExpertByExpert):
    """Gated experts, which transformers holds as one tensor for all of them.

    biases  in float32, whatever the layer computes in
    """

    def __init__(
        self,
        gate: Gate,
        gate_up: Sequence[Product],
        down: Sequence[Product],
        biases: ExpertBiases | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.gate_up = gate_up
        self.down = down
        self.biases = biases

    @property
    def nbytes(self) -> int:
        products = sum(product.nbytes for product in (*self.gate_up, *self.down))
        return products if self.biases is None else products + self.biases.nbytes

    def through_expert(self, expert: int, states: torch.Tensor) -> torch.Tensor:
        first, second = (None, None) if self.biases is None else self.biases.of(expert, states.dtype)
        return self.down[expert].multiply(self.gate(self.gate_up[expert].multiply(states, first)), second)


def pack_layer(
    layer: nn.Module,
    names: ExpertNames | None,
    make_product: MakeProduct,
    pack_experts: PackExperts,
) -> None:
    """Pack what can be packed, in place. Norms, routers and biases stay."""
    if (experts := find_experts(layer, names)) is not None and names is not None:
        layer.set_submodule(names.module, pack_experts(experts))
    linears = packable_linears(layer, names)
    while linears:
        name, linear = linears.popitem()
        layer.set_submodule(name, PackedLinear(linear, make_product))


def round_layer(layer: nn.Module, names: ExpertNames | None, format: WeightFormat) -> None:
    """Give the weights that ``pack_layer`` would pack the values that they have in ``format``, in place."""
    weights = [linear.weight for linear in packable_linears(layer, names).values()]
    if (experts := find_experts(layer, names)) is not None and names is not None:
        weights.extend(names.matrices(experts))
    for weight in weights:
        weight.data.copy_(pack_weight(weight, format).unpack(weight.dtype))


def layer_nbytes(layer: nn.Module) -> int:
    """What the weights of a layer take, packed ones included."""
    packed = (module.nbytes for module in layer.modules() if isinstance(module, PackedLinear | PackedExperts))
    return sum(packed) + sum(parameter.nbytes for parameter in layer.parameters())


def gate_of(experts: Any) -> Gate:
    """What experts of a layer do with gate and up: a gate of their own, or their activation of the gate alone."""
    own = getattr(experts, "gate", None)
    return own if isinstance(own, ClampedGate) else ActivationGate(experts.act_fn)


def biases_of(experts: Any) -> ExpertBiases | None:
    """What experts of a layer add to their products; of transformers' none that does is packed."""
    biases = getattr(experts, "biases", None)
    return biases if isinstance(biases, ExpertBiases) else None


def find_experts(layer: nn.Module, names: ExpertNames | None) -> Any | None:
    """transformers' experts in a sparse layer; None for a dense one, which models with experts have too."""
    if names is None:
        return None
    parent_name, _, name = names.module.rpartition(".")
    experts = getattr(layer.get_submodule(parent_name), name, None)
    return experts if hasattr(experts, "gate_up_proj") else None
