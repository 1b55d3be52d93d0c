"""Norms of transformers' layers: all of them are known, and kernels stand in for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from petalsd.models.architecture import Architecture
from petalsd.models.hf.block import LayerBlock
from petalsd.models.hf.norms import NormStandIn, find_norm
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.source import ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.ops.norm import rms_norm
from tests.numeric import assert_close
from tests.tiny_models import LAYER_VARIANTS, make_tiny

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Transformers' own norms round up to three times in bfloat16."""


def block_of(path: Path, variant: str, dtype: torch.dtype) -> LayerBlock:
    family, overrides = LAYER_VARIANTS[variant]
    make_tiny(family, path, **overrides)
    source = ModelSource(str(path))
    storage = WeightStorage.choose(dtype, torch.device("cpu"), "none")
    block = Ladder(Architecture.read(source.config()), source, storage, 1).build(Rung.PACKED, 1)
    assert isinstance(block, LayerBlock)
    return block


def stand_ins(layer: nn.Module) -> dict[str, NormStandIn]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, NormStandIn)}


@pytest.mark.parametrize("variant", LAYER_VARIANTS)
def test_no_norm_is_left_to_many_operations(variant: str, tmp_path: Path) -> None:
    """Of any family: what is left are norms that torch has as one operation, and those that subtract the mean."""
    layer = block_of(tmp_path, variant, torch.float32).layer
    replaced = stand_ins(layer)
    assert all(type(one.whole).__name__.endswith("RMSNorm") for one in replaced.values())
    inside = {one.whole for one in replaced.values()}
    left = [module for name, module in layer.named_modules() if "norm" in name and module not in inside]
    assert not [module for module in left if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("variant", ["gemma3_text", "olmo2", "qwen3_moe", "gpt_oss", "helium"])
def test_they_are_transformers_norms(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    replaced = stand_ins(block_of(tmp_path, variant, dtype).layer)
    assert len(replaced) >= 2
    for name, norm in replaced.items():
        weight: Any = norm.whole.weight
        x = torch.randn(2, 5, len(weight), generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.inference_mode():
            normed, expected = norm(x), norm.whole(x)
        assert normed.dtype == expected.dtype
        assert not torch.equal(normed, x)
        assert_close(normed.float(), expected.float(), ROUNDING[dtype], ROUNDING[dtype], name)


def test_gradients_are_transformers(tmp_path: Path) -> None:
    for norm in stand_ins(block_of(tmp_path, "gemma2", torch.float32).layer).values():
        x, same = (torch.linspace(-1, 2, 64).requires_grad_() for _ in range(2))
        norm(x).pow(2).sum().backward()
        norm.whole(same).pow(2).sum().backward()
        assert x.grad is not None and same.grad is not None
        assert torch.equal(x.grad, same.grad)


def test_what_leaves_kernels_has_its_norms_back(tmp_path: Path) -> None:
    block = block_of(tmp_path, "phi3", torch.float32)
    names = list(stand_ins(block.layer))
    block.leave_kernels()
    assert not stand_ins(block.layer)
    assert all(type(block.layer.get_submodule(name)).__name__ == "Phi3RMSNorm" for name in names)


class ScaledRMSNorm(nn.Module):
    """Of a formula that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((16,), 0.5))
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * rms_norm(x, self.weight, self.eps)


def test_a_norm_of_another_formula_stays() -> None:
    assert find_norm(ScaledRMSNorm()) is None
    assert find_norm(nn.LayerNorm(16)) is None
    assert find_norm(nn.Linear(16, 16)) is None
