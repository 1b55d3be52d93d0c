"""Run by ``test_families`` in a process without Triton's interpreter: tiny models of all families on a real GPU.

    python -m tests.gpu.families DTYPE QUANTIZATION

Prints one JSON object: for each model what became of its blocks' trials, or the error.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from petalsd.config import Quantization
from petalsd.models.architecture import Architecture
from petalsd.models.ladder import Ladder
from petalsd.models.source import ModelSource
from petalsd.models.weight_storage import WeightStorage
from tests.tiny_models import FAMILIES, LAYER_VARIANTS, make_tiny

DEVICE = torch.device("cuda:0")
# Sizes as models have them, so that no tile is mostly padding.
WIDE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "head_dim": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    **{f"{family}-wide": (family, WIDE) for family in FAMILIES},
    "llama-128": ("llama", {**WIDE, "head_dim": 128}),
    "llama-yarn": ("llama", {"rope": "yarn"}),
    "llama-longrope": ("llama", {"rope": "longrope"}),
    "llama-dynamic": ("llama", {"rope": "dynamic", "max_position_embeddings": 32}),
    **LAYER_VARIANTS,
}


def main() -> None:
    dtype, quantization = getattr(torch, sys.argv[1]), cast(Quantization, sys.argv[2])
    found = {}
    for name, (family, overrides) in MODELS.items():
        with tempfile.TemporaryDirectory() as directory:
            make_tiny(family, Path(directory), **overrides)
            found[name] = _tried(Path(directory), dtype, quantization)
    json.dump(found, sys.stdout)


def _tried(path: Path, dtype: torch.dtype, quantization: Quantization) -> dict[str, Any]:
    try:
        return {"trials": list(_trials(path, dtype, quantization))}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _trials(path: Path, dtype: torch.dtype, quantization: Quantization) -> Iterator[dict[str, Any]]:
    source = ModelSource(str(path))
    ladder = Ladder(
        Architecture.read(source.config()), source, WeightStorage.choose(dtype, DEVICE, quantization), 1
    )
    with torch.inference_mode():
        for index in range(ladder.architecture.config.num_blocks):
            ladder.load(index)
    for choice in ladder.choices.values():
        for trial in choice.trials:
            yield {
                "rung": trial.rung, "kernels": trial.kernels, "error": trial.error, "tolerance": trial.tolerance,
                "is_passed": trial.is_passed,
            }  # fmt: skip


if __name__ == "__main__":
    main()
