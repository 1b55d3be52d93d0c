"""Reading blocks and heads from a directory, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalsd.config import Quantization
from petalsd.errors import WeightsError
from petalsd.models.block_config import BlockConfig
from petalsd.models.source import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.models.weights import block_tensors, files_with, load_block
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.weight_packing import pack_weight
from tests.tiny_models import HIDDEN_SIZE, make_tiny

CPU = torch.device("cpu")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_tiny("llama", tmp_path)
    return tmp_path


def _load(directory: Path, index: int = 1) -> None:
    source = ModelSource(str(directory))
    load_block(source, BlockConfig.from_hf(source.config()), index, torch.float32, CPU)


def _rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Save the single file again with some tensors replaced, or left out where None."""
    tensors = load_file(directory / SINGLE_FILE)
    for name, tensor in changes.items():
        tensors.pop(name) if tensor is None else tensors.update({name: tensor})
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})


def test_only_the_blocks_tensors_are_named(directory: Path) -> None:
    """The tensors of a block are exactly those that the checkpoint has under its prefix."""
    source = ModelSource(str(directory))
    config = BlockConfig.from_hf(source.config())
    named = {name for name in source.index() if name.startswith("model.layers.1.")}
    assert set(block_tensors(config, 1)) == named


def test_weights_are_frozen_and_our_own(directory: Path) -> None:
    """No tensor requires a gradient, and none is a view into the file."""
    source = ModelSource(str(directory))
    config = BlockConfig.from_hf(source.config())
    block = load_block(source, config, 1, torch.float32, CPU)
    assert isinstance(block.weights.qkv, PackedWeight)
    before = block.weights.qkv.unpack(torch.float32)
    (directory / SINGLE_FILE).write_bytes(b"")
    assert torch.equal(block.weights.qkv.unpack(torch.float32), before)
    assert not block.weights.qkv.data.requires_grad
    assert block.nbytes == sum(4 * torch.Size(shape).numel() for shape in block_tensors(config, 1).values())


def test_a_block_comes_from_the_shards_that_hold_it(tmp_path: Path) -> None:
    """Shards that do not hold the block are not opened: they may be missing."""
    make_tiny("qwen2", tmp_path, max_shard_size="100KB")
    source = ModelSource(str(tmp_path))
    config = BlockConfig.from_hf(source.config())
    needed = files_with(source, block_tensors(config, 1))
    for path in tmp_path.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
    _load(tmp_path)
    with pytest.raises(WeightsError, match="is missing"):
        _load(tmp_path, 3)


def test_a_missing_tensor_is_named(directory: Path) -> None:
    """A checkpoint without one of the block's tensors is refused by the tensor's name."""
    _rewrite(directory, **{Q_PROJ: None})
    with pytest.raises(WeightsError, match=f"no file holds the tensor {Q_PROJ}"):
        _load(directory)


def test_a_tensor_that_the_index_promises_but_the_file_lacks_is_named(tmp_path: Path) -> None:
    """An index that does not fit its shards is refused by the file's name."""
    make_tiny("llama", tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    other = next(
        file for file in sorted(set(index["weight_map"].values())) if file != index["weight_map"][Q_PROJ]
    )
    index["weight_map"][Q_PROJ] = other
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=f"{other} cannot be read"):
        _load(tmp_path)


def test_a_wrong_shape_is_named(directory: Path) -> None:
    """A tensor whose shape contradicts config.json is refused with both shapes."""
    _rewrite(directory, **{Q_PROJ: torch.zeros(HIDDEN_SIZE, 7)})
    with pytest.raises(
        WeightsError, match=r"q_proj\.weight has shape \(64, 7\), config\.json means \(64, 64\)"
    ):
        _load(directory)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_tensors_are_refused(directory: Path, dtype: torch.dtype) -> None:
    """Integers and 8-bit floats are not weights that can be cast."""
    _rewrite(directory, **{Q_PROJ: torch.zeros(HIDDEN_SIZE, HIDDEN_SIZE).to(dtype)})
    with pytest.raises(WeightsError, match=r"q_proj\.weight has dtype"):
        _load(directory)


def test_other_float_dtypes_are_cast(directory: Path) -> None:
    """A bfloat16 tensor in the file becomes what the block is loaded in."""
    _rewrite(directory, **{Q_PROJ: torch.ones(HIDDEN_SIZE, HIDDEN_SIZE, dtype=torch.bfloat16)})
    source = ModelSource(str(directory))
    block = load_block(source, BlockConfig.from_hf(source.config()), 1, torch.float32, CPU)
    assert isinstance(block.weights.qkv, PackedWeight)
    assert torch.equal(
        block.weights.qkv.unpack(torch.float32)[:HIDDEN_SIZE], torch.ones(HIDDEN_SIZE, HIDDEN_SIZE)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(directory: Path, value: float) -> None:
    """One bad value in a checkpoint would spread to all answers: the tensor is named instead."""
    weight = torch.zeros(HIDDEN_SIZE, HIDDEN_SIZE)
    weight[3, 5] = value
    _rewrite(directory, **{Q_PROJ: weight})
    with pytest.raises(WeightsError, match=rf"{re.escape(Q_PROJ)} holds values that are not finite"):
        _load(directory)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_projections_are_packed_in_one_piece(directory: Path, quantization: Quantization) -> None:
    """Each projection has the format of the quantization and the fused values of the checkpoint, side by side."""
    source = ModelSource(str(directory))
    config = BlockConfig.from_hf(source.config())
    block = load_block(source, config, 1, torch.float32, CPU, quantization=quantization)
    stored = load_file(directory / SINGLE_FILE)
    format = WeightFormat.FLOAT32 if quantization == "none" else WeightFormat(quantization)
    layers = {
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "output": ["self_attn.o_proj"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    storages = set()
    for field, names in layers.items():
        packed = getattr(block.weights, field)
        expected = pack_weight(torch.cat([stored[f"model.layers.1.{name}.weight"] for name in names]), format)
        assert packed.format == format
        assert torch.equal(packed.unpack(torch.float32), expected.unpack(torch.float32))
        assert packed.data.data_ptr() % 64 == 0
        storages.add(packed.data.untyped_storage().data_ptr())
    assert storages == {block.weights.input_norm.untyped_storage().data_ptr()}
    storage = WeightStorage.choose(torch.float32, CPU, quantization)
    assert block.nbytes <= storage.nbytes(block_tensors(config, 1).values())


def test_float16_stays_in_plain_tensors(directory: Path) -> None:
    """There is no packed format for it; what is loaded can be computed with all the same."""
    source = ModelSource(str(directory))
    block = load_block(source, BlockConfig.from_hf(source.config()), 1, torch.float16, CPU)
    assert isinstance(block.weights.qkv, torch.Tensor)
    assert block.forward_dense(torch.zeros(1, 2, HIDDEN_SIZE, dtype=torch.float16)).dtype == torch.float16


def test_what_a_gpu_keeps_packed() -> None:
    """Quantized weights, as on the CPU; plain ones are tensors there."""
    gpu = torch.device("cuda:0")
    chosen = [
        WeightStorage.choose(torch.bfloat16, gpu, quantization) for quantization in ("none", "int8", "int4")
    ]
    assert [storage.format for storage in chosen] == [None, WeightFormat.INT8, WeightFormat.INT4]
    assert [storage.quantization for storage in chosen] == ["none", "int8", "int4"]


@pytest.mark.parametrize("kept_bytes", [0, 5, 3000])
def test_a_truncated_file_is_refused(directory: Path, kept_bytes: int) -> None:
    """A file that ends early, in its header or its data, is named and nothing is loaded."""
    file = directory / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        _load(directory)


def test_a_bad_header_is_refused(directory: Path) -> None:
    """A header that claims to be huge is an error, not an allocation."""
    file = directory / SINGLE_FILE
    file.write_bytes(b"\xff" * 7 + b"\x7f" + file.read_bytes()[8:])
    with pytest.raises(WeightsError, match="header"):
        _load(directory)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"]
)
def test_pickled_checkpoints_are_refused_with_what_to_do(directory: Path, name: str) -> None:
    """A .bin checkpoint is never opened; the error says how to convert it."""
    (directory / SINGLE_FILE).rename(directory / name)
    with pytest.raises(WeightsError, match="save_pretrained, which writes safetensors"):
        _load(directory)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    """Without config.json the directory is no model; without weights neither."""
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        ModelSource(str(tmp_path)).config()
    with pytest.raises(WeightsError, match="neither"):
        ModelSource(str(tmp_path)).index()


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    """An index that is no JSON object, or names a file elsewhere, is refused by its name."""
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
        ModelSource(str(tmp_path)).index()


def test_an_index_without_its_shards_is_passed_over(tmp_path: Path) -> None:
    """transformers leaves it where a model is saved in shards, and then in one file."""
    model = make_tiny("llama", tmp_path, max_shard_size="100KB")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("model*")} == {SINGLE_FILE, INDEX_FILE}
    _load(tmp_path)
    assert set(ModelSource(str(tmp_path)).index().values()) == {SINGLE_FILE}
    (tmp_path / SINGLE_FILE).unlink()
    with pytest.raises(WeightsError, match=r"model-00\d+-of-00\d+\.safetensors is missing"):
        _load(tmp_path)


@pytest.mark.parametrize("file", [CONFIG_FILE, INDEX_FILE])
def test_json_of_endless_depth_is_refused(directory: Path, file: str) -> None:
    (directory / file).write_text("[" * 200_000)
    with pytest.raises(WeightsError, match=f"{re.escape(file)} of .* cannot be read: nested too deeply"):
        _load(directory)


def test_errors_do_not_show_paths(directory: Path) -> None:
    """What a peer may read names files, not where they lie on this machine."""
    (directory / SINGLE_FILE).write_bytes(b"short")
    with pytest.raises(WeightsError) as caught:
        _load(directory)
    assert str(directory.parent) not in str(caught.value)


@pytest.mark.parametrize("max_shard_size", ["100KB", "1GB"], ids=["sharded", "single"])
def test_a_file_that_this_user_may_not_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_shard_size: str
) -> None:
    """Downloads of others are often theirs alone; the safetensors library calls such a file missing."""
    make_tiny("llama", tmp_path, max_shard_size=max_shard_size)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(WeightsError, match=r"\.safetensors may not be read by the user") as refused:
        _load(tmp_path)
    assert "chmod" in refused.value.hint


@pytest.mark.parametrize("method", ["is_dir", "iterdir", "is_file"])
def test_a_closed_directory_is_told_as_a_file_that_may_not_be_read(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/home/alice, as the service's user meets it."""
    make_tiny("llama", directory := tmp_path / "model")

    def deny(self: Path) -> object:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, method, deny)
    with pytest.raises(
        WeightsError, match=r"^weights_error: model may not be read by the user .*a.x on the dir"
    ):
        ModelSource(str(directory)).index()
