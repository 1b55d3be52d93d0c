"""Which tensors a block is made of, and reading just those from safetensors files."""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import structlog
import torch
from safetensors import SafetensorError, safe_open

from petalsd.config import Quantization
from petalsd.errors import WeightsError
from petalsd.models.block import BlockWeights, TransformerBlock
from petalsd.models.block_config import BlockConfig
from petalsd.models.files import check_readable
from petalsd.models.rope import Rope
from petalsd.models.source import COPY_AGAIN, ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.ops.linear import Weight
from petalsd.ops.memory import Arena
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.staging import Copy, copying_to
from petalsd.ops.weight_packing import pack_rows

log = structlog.get_logger(__name__)

PROJECTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "output": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
)
"""The matrices of ``BlockWeights``, and the linear modules of a checkpoint that are in them, in this order."""


def block_tensors(config: BlockConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of block ``index``'s tensors in a checkpoint; the four families agree on them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    prefix = f"model.layers.{index}."
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    biased = [
        *(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] if config.qkv_bias else []),
        *(["self_attn.o_proj"] if config.output_bias else []),
        *(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if config.mlp_bias else []),
    ]
    shapes.update({f"{name}.bias": shapes[f"{name}.weight"][:1] for name in biased})
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return {prefix + name: shape for name, shape in shapes.items()}


def files_with(source: ModelSource, tensors: Iterable[str]) -> list[str]:
    """The source's files that hold these tensors, sorted; WeightsError names a tensor that no file holds."""
    index = source.index()
    files = set()
    for name in tensors:
        file = index.get(name)
        if file is None:
            raise WeightsError(
                f"{source.name}: no file holds the tensor {name}",
                hint="the checkpoint and its config.json do not belong together, or it is incomplete",
            )
        files.add(file)
    return sorted(files)


def load_block(
    source: ModelSource,
    config: BlockConfig,
    index: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rope: Rope | None = None,
    quantization: Quantization = "none",
) -> TransformerBlock:
    """Read block ``index``, cast to ``dtype``, on ``device``; fetches its files first where they are missing.

    ``rope`` is what the model's blocks share; a block that is loaded alone gets its own. Raises WeightsError.
    """
    storage = WeightStorage.choose(dtype, device, quantization)
    tensors = read_tensors(source, block_tensors(config, index))
    weights = assemble_block(tensors.__getitem__, config, index, storage)
    log.debug("block_loaded", block=index, nbytes=weights.nbytes)
    return TransformerBlock(index, config, weights, rope or Rope(config, dtype, device))


def assemble_block(
    tensor: Callable[[str], torch.Tensor], config: BlockConfig, index: int, storage: WeightStorage
) -> BlockWeights:
    """A block from the tensors of ``block_tensors``, each asked for once by name, copied into its own memory."""
    shapes = block_tensors(config, index).values()
    with copying_to(storage.device) as copy:
        return _place_block(config, Placement(tensor, f"model.layers.{index}.", storage, shapes, copy))


def _place_block(config: BlockConfig, place: Placement) -> BlockWeights:
    return BlockWeights(
        input_norm=place.fuse(["input_layernorm.weight"]),
        qkv=place.project("qkv"),
        output=place.project("output"),
        mlp_norm=place.fuse(["post_attention_layernorm.weight"]),
        gate_up=place.project("gate_up"),
        down=place.project("down"),
        qkv_bias=place.fuse_if(config.qkv_bias, [f"{name}.bias" for name in PROJECTIONS["qkv"]]),
        q_norm=place.fuse_if(config.qk_norm, ["self_attn.q_norm.weight"]),
        k_norm=place.fuse_if(config.qk_norm, ["self_attn.k_norm.weight"]),
        output_bias=place.fuse_if(config.output_bias, ["self_attn.o_proj.bias"]),
        gate_up_bias=place.fuse_if(config.mlp_bias, [f"{name}.bias" for name in PROJECTIONS["gate_up"]]),
        down_bias=place.fuse_if(config.mlp_bias, ["mlp.down_proj.bias"]),
    )


class Placement:
    """Copies tensors to their places, side by side in the order in which they are asked for."""

    def __init__(
        self,
        tensor: Callable[[str], torch.Tensor],
        prefix: str,
        storage: WeightStorage,
        shapes: Collection[tuple[int, ...]],
        copy: Copy = torch.Tensor.copy_,
    ) -> None:
        """``shapes`` are those of all tensors that will be placed."""
        self._tensor = tensor
        self._prefix = prefix
        self._storage = storage
        self._copy = copy
        # A packed weight may have scales beside it.
        self._arena = Arena(storage.nbytes(shapes), 2 * len(shapes), storage.device)

    def project(self, projection: str) -> Weight:
        """One of ``PROJECTIONS``, packed where the storage says so."""
        names = [f"{layer}.weight" for layer in PROJECTIONS[projection]]
        format = self._storage.format
        if format is None:
            return self.fuse(names)
        return self.pack(names, format)

    def pack(self, names: list[str], format: WeightFormat) -> PackedWeight:
        """These tensors one below the other, packed."""
        parts = [self._tensor(self._prefix + name) for name in names]
        num_out = sum(len(part) for part in parts)
        packed = PackedWeight.empty(format, num_out, parts[0].shape[1], self._arena.empty)
        pack_rows(parts, packed, self._copy)
        return packed

    def fuse(self, names: list[str]) -> torch.Tensor:
        """These tensors one below the other, cast and copied straight to their place in the arena."""
        parts = [self._tensor(self._prefix + name) for name in names]
        rows = sum(len(part) for part in parts)
        fused = self._arena.empty((rows, *parts[0].shape[1:]), self._storage.dtype)
        start = 0
        for part in parts:
            self._copy(fused[start : start + len(part)], part)
            start += len(part)
        return fused

    def fuse_if(self, is_present: bool, names: list[str]) -> torch.Tensor | None:
        return self.fuse(names) if is_present else None


def read_tensors(
    source: ModelSource,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """Map these tensors from the source's files, each checked against its shape. Raises WeightsError.

    dtypes  of those that are parts of packed weights; all others hold finite numbers
    """
    source.fetch(files_with(source, shapes))
    index = source.index()
    names_by_file: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        names_by_file[index[name]].append(name)
    tensors: dict[str, torch.Tensor] = {}
    for file, names in names_by_file.items():
        stored = {source.stored_name(name): name for name in names}
        read = read_file(source.path(file), file, stored)
        tensors.update({stored[name]: tensor for name, tensor in read.items()})
    for name, shape in shapes.items():
        _check_shape(name, tensors[name], shape, index[name])
        if name in dtypes:
            _check_dtype(name, tensors[name], dtypes[name], index[name])
        else:
            check_values(name, tensors[name], index[name])
    return tensors


def read_file(path: Path, file_name: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Map these tensors from a safetensors file, which messages call ``file_name``. Raises WeightsError."""
    check_readable(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise WeightsError(
            f"{file_name} cannot be read: {error}",
            hint=COPY_AGAIN,
        ) from error


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], file: str) -> None:
    if tuple(tensor.shape) != shape:
        raise WeightsError(f"{file}: {name} has shape {tuple(tensor.shape)}, config.json means {shape}")


def _check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype, file: str) -> None:
    if tensor.dtype != dtype:
        raise WeightsError(f"{file}: {name} has dtype {tensor.dtype}, {dtype} is what its format has")


def check_values(name: str, tensor: torch.Tensor, file: str) -> None:
    """WeightsError for a tensor of a dtype that is not read, or with values that are not finite."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise WeightsError(
            f"{file}: {name} has dtype {tensor.dtype}, one of bfloat16, float16, float32 is read",
            hint="it is a quantized checkpoint that is not read: use the one that it was made from",
        )
    if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
        raise WeightsError(
            f"{file}: {name} holds values that are not finite",
            hint="the checkpoint is damaged: use another revision, or the one that it was made from",
        )
