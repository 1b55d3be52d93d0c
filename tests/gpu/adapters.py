"""Run by ``test_adapters`` in a process without Triton's interpreter: blocks with an adapter on a real GPU.

    python -m tests.gpu.adapters DTYPE QUANTIZATION

Prints one JSON object: for each model how far its adapted block is from the one of the model that the adapter was
merged into, in float32, as a share of what the block adds to the states.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from petalsd.config import Quantization
from petalsd.models.adapters import Adapter
from petalsd.models.architecture import Architecture
from petalsd.models.contract import Block
from petalsd.models.ladder import Ladder
from petalsd.models.source import ModelSource
from petalsd.models.spans import paged_span
from petalsd.models.weight_storage import WeightStorage
from petalsd.types import BlockSpan
from tests.adapter_files import draw_adapter, merge, write_adapter
from tests.gpu.families import DEVICE, WIDE
from tests.paged_rows import PagedRows
from tests.tiny_models import LAYER_VARIANTS, make_tiny

INDEX = 1
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, WIDE) for family in ("llama", "qwen3")},
    **{variant: LAYER_VARIANTS[variant] for variant in ("bloom", "falcon-new", "qwen3_moe")},
}
STEPS = [{0: 9}, {0: 1}, {0: 1, 1: 70}, {0: 1, 1: 1}]


def main() -> None:
    dtype, quantization = getattr(torch, sys.argv[1]), cast(Quantization, sys.argv[2])
    found = {}
    for name, (family, overrides) in MODELS.items():
        with tempfile.TemporaryDirectory() as directory:
            found[name] = errors(Path(directory), family, overrides, dtype, quantization)
    json.dump(found, sys.stdout)


def errors(
    path: Path, family: str, overrides: dict[str, Any], dtype: torch.dtype, quantization: Quantization
) -> dict[str, float]:
    model = make_tiny(family, path / "base", **overrides)
    modules = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (".layers." in name or ".h." in name)
    ]
    tensors = draw_adapter(model, modules)
    merge(model, tensors)
    model.save_pretrained(path / "merged")
    ladder, merged_ladder = (
        _ladder(path / "base", dtype, quantization),
        _ladder(path / "merged", torch.float32),
    )
    with torch.inference_mode():
        base, merged = ladder.load(INDEX), merged_ladder.load(INDEX)
    adapter = Adapter.open(ModelSource(str(write_adapter(path / "adapter", tensors))), ladder.architecture)
    adapted = adapter.adapt(base, ladder.make_product)
    assert adapted is not None
    hidden = torch.randn(2, 11, ladder.architecture.config.hidden_size, device=DEVICE)

    def error(ours: torch.Tensor, expected: torch.Tensor, entered: torch.Tensor) -> float:
        return float((ours.float() - expected).norm() / (expected - entered).norm())

    whole = [block.forward_dense(hidden.to(of)) for block, of in ((adapted, dtype), (merged, torch.float32))]
    steps = [_run_steps(ladder, adapted, hidden, dtype), _run_steps(merged_ladder, merged, hidden)]
    return {
        "without": error(base.forward_dense(hidden.to(dtype)), whole[1], hidden),
        "whole": error(*whole, hidden),
        "steps": max(
            error(ours, expected, entered) for (ours, _), (expected, entered) in zip(*steps, strict=True)
        ),
    }


def _ladder(path: Path, dtype: torch.dtype, quantization: Quantization = "none") -> Ladder:
    source = ModelSource(str(path))
    storage = WeightStorage.choose(dtype, DEVICE, quantization)
    return Ladder(Architecture.read(source.config()), source, storage, 1)


def _run_steps(
    ladder: Ladder, block: Block, hidden: torch.Tensor, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each of ``STEPS`` what leaves the block, and what entered it."""
    config, served = ladder.architecture.config, BlockSpan(INDEX, INDEX + 1)
    span = paged_span({INDEX: block}, 1)
    shape = (config.num_blocks, config.num_kv_heads, config.head_dim)
    found = []
    with DEVICE, torch.inference_mode():
        rows = PagedRows(*shape, page_tokens=16, dtype=dtype)
        for _ in range(2):
            rows.add_row()
        for new in STEPS:
            batch = rows.extend(new)
            entered = hidden.flatten(0, 1).repeat(4, 1)[: sum(new.values())]
            cos_sin = ladder.angles.cos_sin(batch.positions, batch.positions + 1)
            found.append((span.forward_paged(served, entered.to(dtype), rows.kv, batch, cos_sin), entered))
    return found


if __name__ == "__main__":
    main()
