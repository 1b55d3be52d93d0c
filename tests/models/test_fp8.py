"""Checkpoints in FP8 with a scale for each block of a weight are read as the values that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from petalsd.config import Quantization
from petalsd.errors import UnsupportedModel, WeightsError
from petalsd.models.architecture import Architecture
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.source import SINGLE_FILE, ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.types import BlockSpan
from tests.numeric import assert_close
from tests.reference_layers import through_layers
from tests.tiny_models import LAYER_VARIANTS, make_tiny

CPU = torch.device("cpu")
ROWS, COLUMNS = 24, 32  # weights end within a block
PUBLISHED = {"quant_method": "fp8", "weight_block_size": [ROWS, COLUMNS], "modules_to_not_convert": ["gate"]}
QUERY = "model.layers.1.self_attn.q_proj.weight"
SCALES = f"{QUERY}_scale_inv"


def make_published(family: str, path: Path) -> None:
    """A tiny model with linear modules and experts in FP8; ``path / plain`` has the values that they stand for."""
    make_tiny(family, path / "plain", **LAYER_VARIANTS[family][1])
    tensors = load_file(path / "plain" / SINGLE_FILE)
    packed, values = {}, {}
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.dim() == 2 and not name.endswith("gate.weight"):
            packed |= pack(name, tensor)
            values[name] = unpack(packed[name], packed[f"{name}_scale_inv"])
        else:
            packed[name] = values[name] = tensor
    save_file(values, path / "plain" / SINGLE_FILE, metadata={"format": "pt"})
    save_file(packed, path / SINGLE_FILE)
    config = json.loads((path / "plain" / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": PUBLISHED}))


def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scales = torch.empty(-(-weight.shape[0] // ROWS), -(-weight.shape[1] // COLUMNS))
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row, column in torch.cartesian_prod(*(torch.arange(size) for size in scales.shape)).tolist():
        place = slice(row * ROWS, (row + 1) * ROWS), slice(column * COLUMNS, (column + 1) * COLUMNS)
        scales[row, column] = weight[place].abs().max() / 448
        stored[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scales}


def unpack(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows, columns = (
        torch.arange(size) // step for size, step in zip(stored.shape, (ROWS, COLUMNS), strict=True)
    )
    return stored.float() * scales[rows][:, columns]


def make_ladder(path: Path, quantization: Quantization = "none") -> Ladder:
    source = ModelSource(str(path))
    storage = WeightStorage.choose(torch.float32, CPU, quantization)
    return Ladder(Architecture.read(source.config()), source, storage, num_threads=1)


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "qwen3_moe"])
def test_blocks_compute_what_the_values_do(family: str, tmp_path: Path) -> None:
    """Packed and plain, and through the trial with weights of a few bits."""
    make_published(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, attn_implementation="eager"
    )
    hidden = torch.randn(1, 30, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    ladder = make_ladder(tmp_path)
    for index in (1, 2):
        with torch.no_grad():
            expected = through_layers(model, hidden, BlockSpan(index, index + 1))
            for rung in (Rung.PACKED, Rung.PLAIN):
                states = ladder.build(rung, index).forward_dense(hidden)
                assert_close(states, expected, 1e-4, 1e-4, f"block {index}, {rung}")
    quantized = make_ladder(tmp_path, "int4")
    quantized.load(2)
    assert [trial.is_passed for choice in quantized.choices.values() for trial in choice.trials] == [True]


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        (QUERY, lambda weight: weight.bfloat16(), f"{QUERY} has dtype torch.bfloat16, torch.float8_e4m3fn"),
        (
            QUERY,
            lambda weight: torch.full_like(weight, torch.nan),
            f"{QUERY} makes values that are not finite",
        ),
        (QUERY, lambda weight: weight[:5], rf"{QUERY} has shape \(5, 64\)"),
        (SCALES, lambda scales: scales[:1], rf"{SCALES} has shape \(1, 2\), config.json means \(3, 2\)"),
        (SCALES, lambda scales: scales * torch.inf, f"{SCALES} holds values that are not finite"),
        (SCALES, lambda scales: None, f"{QUERY} has dtype torch.float8_e4m3fn, one of bfloat16"),
    ],
)
def test_damaged_weights_are_refused(
    name: str, change: Callable[[torch.Tensor], Any], named: str, tmp_path: Path
) -> None:
    """WeightsError names the tensor."""
    make_published("minimax_m2", tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    changed = change(tensors.pop(name))
    kept = tensors if changed is None else {**tensors, name: changed.contiguous()}
    save_file(kept, tmp_path / SINGLE_FILE)
    with pytest.raises(WeightsError, match=named):
        make_ladder(tmp_path).load(1)


@pytest.mark.parametrize("block", [None, [128], [0, 128], 128])
def test_other_ways_to_scale_are_refused(block: Any) -> None:
    """When sizes are asked for, before anything is fetched."""
    quantization = {"quant_method": "fp8", "weight_block_size": block}
    architecture = Architecture.read({"model_type": "qwen3_moe", "quantization_config": quantization})
    with pytest.raises(UnsupportedModel, match="weight_block_size"):
        architecture.largest_block()
