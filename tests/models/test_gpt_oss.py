"""gpt-oss as it is published, its experts in MXFP4: transformers' values, or an error that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from petalsd.config import Quantization
from petalsd.errors import ModelError, UnsupportedModel, WeightsError
from petalsd.models.architecture import Architecture
from petalsd.models.hf.block import LayerBlock
from petalsd.models.hf.experts import KernelExperts
from petalsd.models.hf.packing import PackedExperts
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.source import SINGLE_FILE, ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.types import BlockSpan
from tests.numeric import assert_close
from tests.reference_layers import through_layers
from tests.tiny_models import LAYER_VARIANTS, make_tiny

CPU = torch.device("cpu")
PREFIX = "model.layers.1.mlp.experts."
BLOCKS, SCALES = f"{PREFIX}down_proj_blocks", f"{PREFIX}down_proj_scales"
PUBLISHED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def make_published(path: Path, **overrides: Any) -> PreTrainedModel:
    """A tiny model whose experts are in MXFP4 in its files, and have those values in memory."""
    model = make_tiny("gpt_oss", path, **{**LAYER_VARIANTS["gpt_oss"][1], **overrides})
    tensors, generator = load_file(path / SINGLE_FILE), torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        count, num_in, num_out = parameter.shape
        groups = (count, num_out, num_in // 32)
        blocks = torch.randint(256, (*groups, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 125, groups, dtype=torch.uint8, generator=generator)
        parameter.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        del tensors[name]
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, path / SINGLE_FILE)
    change_config(path, quantization_config=PUBLISHED)
    return model


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def make_ladder(
    path: Path, dtype: torch.dtype = torch.float32, quantization: Quantization = "none"
) -> Ladder:
    source = ModelSource(str(path))
    storage = WeightStorage.choose(dtype, CPU, quantization)
    return Ladder(Architecture.read(source.config()), source, storage, num_threads=1)


@pytest.mark.parametrize("rung", [Rung.PACKED, Rung.PLAIN])
def test_published_experts_compute_what_transformers_does(rung: Rung, tmp_path: Path) -> None:
    model = make_published(tmp_path)
    hidden = torch.randn(1, 40, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    ladder = make_ladder(tmp_path)
    with torch.no_grad():
        for index in range(4):
            expected = through_layers(model, hidden, BlockSpan(index, index + 1))
            assert_close(
                ladder.build(rung, index).forward_dense(hidden), expected, 1e-4, 1e-4, f"block {index}"
            )


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_the_trial_passes_with_published_experts(quantization: Quantization, tmp_path: Path) -> None:
    """Transformers' own layer is read from the same tensors, and rounded along the same rows."""
    make_published(tmp_path)
    ladder = make_ladder(tmp_path, torch.bfloat16, quantization)
    for index in (0, 1):
        ladder.load(index)
    assert {choice.taken.rung for choice in ladder.choices.values()} == {Rung.PACKED}
    assert all(len(choice.trials) == 1 for choice in ladder.choices.values())
    block, values = ladder.load(0), 4 * (64 * 320 + 160 * 64)
    assert isinstance(block, LayerBlock)
    experts = block.layer.get_submodule("mlp.experts")
    assert isinstance(experts, KernelExperts) and isinstance(experts.whole, PackedExperts)
    assert 1 < block.nbytes / values / {"none": 2, "int8": 1, "int4": 0.5}[quantization] < 2
    assert set(ladder.choices) == {"sliding_attention", "full_attention"}


def test_sizes_are_those_of_the_values(tmp_path: Path) -> None:
    """What a block takes in memory is not what it takes in a file; the names are those of the file."""
    make_published(tmp_path)
    published = Architecture.read(json.loads((tmp_path / "config.json").read_text()))
    names = published.tensor_names(1, ModelSource(str(tmp_path)))
    assert {BLOCKS, SCALES} < set(names) and f"{PREFIX}down_proj" not in names
    plain = Architecture.read(
        {**json.loads((tmp_path / "config.json").read_text()), "quantization_config": None}
    )
    assert sorted(published.largest_block()) == sorted(plain.largest_block())


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        (BLOCKS, lambda blocks: blocks.float(), f"{BLOCKS} has dtype torch.float32, torch.uint8"),
        (BLOCKS, lambda blocks: blocks[..., :8].contiguous(), rf"{BLOCKS} has shape \(4, 64, 5, 8\)"),
        (SCALES, lambda scales: scales.to(torch.int8), f"{SCALES} has dtype torch.int8, torch.uint8"),
        (SCALES, lambda scales: scales[:, :3].contiguous(), rf"{SCALES} has shape \(4, 3, 5\)"),
        (SCALES, lambda scales: scales.fill_(255), f"{SCALES} .*not finite"),
        (SCALES, lambda scales: None, f"no file holds the tensor {SCALES}"),
        (
            f"{PREFIX}down_proj_bias",
            lambda bias: bias.to(torch.uint8),
            "down_proj_bias has dtype torch.uint8",
        ),
    ],
)
def test_damaged_experts_are_refused(name: str, change: Any, named: str, tmp_path: Path) -> None:
    """WeightsError names the tensor."""
    make_published(tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed}, tmp_path / SINGLE_FILE)
    with pytest.raises(WeightsError, match=named):
        make_ladder(tmp_path).load(1)


def test_rows_that_are_no_blocks_are_refused(tmp_path: Path) -> None:
    """The format has no other."""
    make_published(tmp_path)
    change_config(tmp_path, intermediate_size=150)
    with pytest.raises(ModelError, match="rows of 150 values"):
        make_ladder(tmp_path).load(0)


@pytest.mark.parametrize(("family", "method"), [("gpt_oss", "fp8"), ("mixtral", "mxfp4"), ("llama", "mxfp4")])
def test_other_quantized_checkpoints_are_refused(family: str, method: str) -> None:
    raw = {"model_type": family, "quantization_config": {"quant_method": method}}
    with pytest.raises(UnsupportedModel, match=f"quant_method = '{method}'"):
        Architecture.read(raw)
