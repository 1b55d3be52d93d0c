"""Packing a layer: what is replaced, and that nothing is held twice."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from petalsd.models.cpu_products import CpuProducts
from petalsd.models.hf.family import ExpertNames
from petalsd.models.hf.packing import layer_nbytes, pack_layer
from petalsd.models.weight_storage import WeightStorage
from petalsd.ops.packed_weight import WeightFormat
from petalsd.ops.weight_packing import pack_weight

CPU = torch.device("cpu")
MATRICES = [(40, 24), (8, 40), *[(32, 24)] * 3, *[(24, 16)] * 3]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.rand(3, 32, 24))
        self.down_proj = nn.Parameter(torch.rand(3, 24, 16))
        self.act_fn = nn.SiLU()


def test_a_layers_plain_weights_go_when_they_are_packed() -> None:
    """Nothing holds them any more, wherever in the layer they were; packed ones take what was planned."""
    layer = nn.Sequential(
        nn.Linear(24, 40), nn.ModuleDict({"inner": nn.Linear(40, 8, bias=False)}), nn.LayerNorm(8)
    )
    layer.add_module("mlp", nn.ModuleDict({"experts": Experts()}))
    layer.requires_grad_(False)
    weights = [weakref.ref(parameter) for parameter in layer.parameters() if parameter.dim() > 1]
    assert len(weights) == 4
    products, storage = CpuProducts(1), WeightStorage.choose(torch.float32, CPU)
    pack_layer(
        layer,
        ExpertNames(),
        lambda weight: products.product(pack_weight(weight, WeightFormat.FLOAT32)),
        lambda experts: products.pack_experts(experts, WeightFormat.FLOAT32),
    )
    assert [weight() for weight in weights] == [None] * 4
    assert layer_nbytes(layer) == storage.nbytes([*MATRICES, (40,), (8,), (8,)])
    assert {name for name, _ in layer.named_parameters()} == {"0.bias", "2.weight", "2.bias"}
