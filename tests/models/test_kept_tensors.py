"""Tensors of a layer that keep their form whatever is served in: float32 ones, and routers that are linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from petalsd.config import Quantization
from petalsd.models.architecture import Architecture
from petalsd.models.hf.block import LayerBlock
from petalsd.models.hf.families import FAMILIES
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.source import SINGLE_FILE, ModelSource
from petalsd.models.weight_storage import WeightStorage
from tests.tiny_models import LAYER_VARIANTS, make_tiny

CPU = torch.device("cpu")
LAST = 3
"""A sparse block in all of these models."""
KEPT = {name: family.float32 for name, family in FAMILIES.items() if family.float32}
ROUTERS = {
    name: family.experts.router
    for name, family in FAMILIES.items()
    if family.experts and family.experts.router
}


def layer_of(path: Path, rung: Rung, quantization: Quantization = "none") -> nn.Module:
    """The last block's, in bfloat16."""
    source = ModelSource(str(path))
    storage = WeightStorage.choose(torch.bfloat16, CPU, quantization)
    block = Ladder(Architecture.read(source.config()), source, storage, 1).build(rung, LAST)
    assert isinstance(block, LayerBlock)
    return block.layer


@pytest.mark.parametrize(
    "name", sorted(name for name, family in FAMILIES.items() if family.experts is not None)
)
def test_what_transformers_keeps_in_float32_is_kept(name: str) -> None:
    """By the list that its models have for it."""
    family = FAMILIES[name]
    (pretrained,) = (value for key, value in vars(family.module).items() if key.endswith("PreTrainedModel")
                     and key != "PreTrainedModel")  # fmt: skip
    strict = getattr(pretrained, "_keep_in_fp32_modules_strict", None) or ()
    _, settings = LAYER_VARIANTS[name]
    config: dict[str, Any] = {"model_type": name, "num_hidden_layers": 4, **settings}
    config.pop("rope", None)
    names = Architecture.read(config).layers.empty_layer(LAST).state_dict()
    assert {one for one in names if any(part in one for part in strict)} <= set(family.float32) <= set(names)


@pytest.mark.parametrize("name", KEPT)
def test_float32_tensors_keep_the_checkpoints_values(name: str, tmp_path: Path) -> None:
    """Rounded to the serving dtype, a correction of experts' scores would choose other experts."""
    family, overrides = LAYER_VARIANTS[name]
    make_tiny(family, tmp_path, **overrides)
    stored = [tensor for key, tensor in load_file(tmp_path / SINGLE_FILE).items() if f"layers.{LAST}." in key]
    for rung, quantization in ((Rung.PLAIN, "none"), (Rung.PACKED, "none"), (Rung.PACKED, "int8")):
        state = layer_of(tmp_path, rung, quantization).state_dict()  # type: ignore[arg-type]
        for kept in KEPT[name]:
            assert state[kept].dtype == torch.float32
            assert any(torch.equal(state[kept], one) for one in stored if one.shape == state[kept].shape), (
                kept
            )
        others = [tensor for key, tensor in state.items() if key not in KEPT[name]]
        assert others and all(tensor.dtype == torch.bfloat16 for tensor in others)


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_are_not_packed(name: str, tmp_path: Path) -> None:
    """Nor adapted; the layer's other linear modules are."""
    family, overrides = LAYER_VARIANTS[name]
    make_tiny(family, tmp_path, **overrides)
    layer = layer_of(tmp_path, Rung.PACKED, "int4")
    assert [key for key, module in layer.named_modules() if isinstance(module, nn.Linear)] == [ROUTERS[name]]
    architecture = Architecture.read(ModelSource(str(tmp_path)).config())
    assert ROUTERS[name] not in architecture.layers.linear_shapes(LAST)
