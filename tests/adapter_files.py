"""Adapters in the format of the PEFT library, and the same change made in the weights of a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

ALPHA = 6
RANK = 4
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_rslora": False, "use_dora": False,
    "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "inference_mode": True,
}  # fmt: skip

Tensors = dict[str, torch.Tensor]


def draw_adapter(model: PreTrainedModel, modules: Iterable[str], rank: int = RANK, seed: int = 5) -> Tensors:
    """Tensors for these linear modules of ``model``, whose terms are about as large as what they are added to."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name in modules:
        num_out, num_in = model.get_submodule(name).weight.shape
        a = torch.randn(rank, num_in, generator=generator) / num_in**0.5
        b = torch.randn(num_out, rank, generator=generator) / rank**0.5
        tensors |= {f"base_model.model.{name}.lora_{side}.weight": t for side, t in (("A", a), ("B", b))}
    return tensors


def write_adapter(path: Path, tensors: Mapping[str, torch.Tensor], **fields: Any) -> Path:
    """The two files of an adapter in ``path``; ``fields`` of its configuration differ from ``CONFIG``."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **fields}))
    save_file(dict(tensors), path / "adapter_model.safetensors")
    return path


@torch.no_grad()
def merge(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], scale: float = ALPHA / RANK) -> None:
    """``W + scale * B @ A`` for every weight of ``model`` that the adapter has tensors for."""
    for name, a in tensors.items():
        if ".lora_A." in name:
            module = model.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A.")[0])
            assert isinstance(module, nn.Linear)
            module.weight += scale * tensors[name.replace(".lora_A.", ".lora_B.")] @ a
