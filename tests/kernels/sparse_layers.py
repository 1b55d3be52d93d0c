"""Small sparse layers of transformers, and the same with experts by kernels, as a ladder builds them on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING

from petalsd.models.gpu_products import GpuProducts
from petalsd.models.hf.block import first_tensor
from petalsd.models.hf.families import family_of
from petalsd.models.hf.gpt_oss import BiasedExperts
from petalsd.models.hf.layer import Layers
from petalsd.models.hf.packing import pack_layer, round_layer
from petalsd.ops.packed_weight import WeightFormat
from petalsd.ops.weight_packing import pack_weight
from tests.device import DEVICE
from tests.tiny_models import LAYER_VARIANTS

SPARSE_FAMILIES = ["gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]


def layers_of(family: str, **overrides: Any) -> Layers:
    name, settings = LAYER_VARIANTS[family]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIG_MAPPING[name](**{**sizes, "num_key_value_heads": 2, **settings, **overrides})
    return Layers(family_of(name), config)


def with_kernels(layers: Layers, layer: nn.Module, format: WeightFormat | None) -> nn.Module:
    """The layer as a ladder builds it on a GPU, its weights in ``format``."""
    device = next(layer.parameters()).device
    products, names = GpuProducts(device, 8), layers.family.experts
    assert names is not None
    if format is not None:
        pack_layer(
            layer,
            names,
            lambda weight: products.product(pack_weight(weight.cpu(), format).to(device)),
            lambda experts: products.pack_experts(experts, format),
        )
    products.replace_experts(layer, names)
    return layer


def sparse_pair(
    family: str,
    format: WeightFormat | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = DEVICE,
    **overrides: Any,
) -> tuple[nn.Module, nn.Module]:
    """transformers' sparse MLP, its weights rounded, and the same by kernels."""
    layers = layers_of(family, **overrides)
    ours = layers.random(0, dtype, device)
    for parameter in ours.parameters():  # so that states keep their size
        parameter.mul_(6.0)
    theirs = _as_theirs(layers, ours)
    ours = with_kernels(layers, ours, format)
    if format is not None:
        round_layer(theirs, layers.family.experts, format)
    pair = theirs.get_submodule("mlp"), ours.get_submodule("mlp")
    for mlp in pair:  # of which some give what their router computed as well
        mlp.register_forward_hook(lambda module, arguments, result: first_tensor(result))
    return pair


def _as_theirs(layers: Layers, ours: nn.Module) -> nn.Module:
    """transformers' unchanged layer with copies of the same weights."""
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    names = layers.family.experts
    assert names is not None
    experts = ours.get_submodule(names.module)
    if isinstance(experts, BiasedExperts):
        for name in ("gate_up", "gate_up_bias"):
            state[f"{names.module}.{name}"] = torch.stack(
                getattr(experts, name).chunk(2, dim=1), dim=2
            ).flatten(1, 2)
        for name in ("gate_up", "down"):
            bias = state.pop(f"{names.module}.{name}_bias")
            state[f"{names.module}.{name}_proj_bias"] = bias
            weight = state.pop(f"{names.module}.{name}")
            state[f"{names.module}.{name}_proj"] = weight.transpose(1, 2).contiguous()
    theirs = layers.empty_layer(0, is_plain=True)
    theirs.load_state_dict(state, assign=True)
    return theirs.requires_grad_(False)
