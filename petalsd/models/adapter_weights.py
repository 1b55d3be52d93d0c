"""Which low-rank matrices an adapter's file has, for which linear module of which block, and reading them."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from petalsd.errors import WeightsError
from petalsd.models.adapter_config import AdapterConfig
from petalsd.models.architecture import Architecture
from petalsd.models.files import check_readable
from petalsd.models.source import name_alone
from petalsd.models.weights import check_values, read_file
from petalsd.ops.low_rank import LowRankFactors

ADAPTER_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_NAME = re.compile(rf"(?:{re.escape(_PREFIX)})?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# Modules that only pictures go through; an adapter of a whole model of text and images may have terms for them.
_OF_PICTURES = re.compile(rf"(?:{re.escape(_PREFIX)})?(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
_MAKE_AGAIN = "the file is damaged, or does not belong to its adapter_config.json: use another revision"


@dataclass(frozen=True, slots=True)
class LowRankPair:
    """Names of the two tensors of one module; ``a`` is ``[rank, num_in]``, ``b`` ``[num_out, rank]``."""

    a: str
    b: str
    num_in: int
    num_out: int
    rank: int
    scale: float

    def nbytes(self, dtype: torch.dtype) -> int:
        return self.rank * (self.num_in + self.num_out) * dtype.itemsize


BlockPairs: TypeAlias = dict[str, LowRankPair]
"""By names of linear modules in a block."""


class PairFinder:
    """Matches the tensors of ``adapter``'s file with the linear modules of a model's blocks."""

    def __init__(self, adapter: str, config: AdapterConfig, architecture: Architecture) -> None:
        self._adapter = adapter
        self._config = config
        self._architecture = architecture
        prefixes = "|".join(re.escape(prefix) for prefix in architecture.layers.family.prefixes)
        self._block_name = re.compile(rf"(?:{prefixes})(?P<block>\d{{1,6}})\.(?P<module>.+)")
        self._linears: dict[str, dict[str, tuple[int, int]]] = {}

    def find(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, BlockPairs]:
        """By block; ``shapes`` are those of all tensors in the file. WeightsError if one cannot be served.

        What an adapter has for images has no part in what becomes of text, and is left out.
        """
        found: dict[tuple[int, str], dict[str, str]] = {}
        for tensor in sorted(shapes):
            if _OF_PICTURES.match(tensor):
                continue
            place, side = self._place(tensor)
            names = found.setdefault(place, {})
            if side in names:
                raise self._error(f"has {tensor} and {names[side]}, which mean the same", hint=_MAKE_AGAIN)
            names[side] = tensor
        if not found:
            what = "tensors for images alone" if shapes else "no tensors"
            raise self._error(f"has {what}", hint=_MAKE_AGAIN)
        blocks: dict[int, BlockPairs] = {}
        for (index, module), names in found.items():
            blocks.setdefault(index, {})[module] = self._pair(names, self._linears_of(index)[module], shapes)
        return blocks

    def _place(self, tensor: str) -> tuple[tuple[int, str], str]:
        """Block and name in it of the linear module, and A or B."""
        named = _NAME.fullmatch(tensor)
        placed = None if named is None else self._block_name.fullmatch(name_alone(named["module"]))
        if named is None or placed is None:
            raise self._not_served(tensor)
        index, count = int(placed["block"]), self._architecture.config.num_blocks
        if index >= count:
            raise self._error(
                f"has {tensor}, but the model has {count} blocks", hint="it was made for another model"
            )
        linears = self._linears_of(index)
        if placed["module"] not in linears:
            raise self._not_served(tensor, f"linear modules of block {index} are {', '.join(linears)}")
        return (index, placed["module"]), named["side"]

    def _pair(
        self, names: Mapping[str, str], shape: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]
    ) -> LowRankPair:
        for side, other in ("AB", "BA"):
            if side not in names:
                raise self._error(f"has {names[other]}, but no lora_{side} beside it", hint=_MAKE_AGAIN)
        module = names["A"].removeprefix(_PREFIX).rpartition(".lora_A.")[0]
        (num_out, num_in), rank = shape, self._config.rank_of(module)
        for side, expected in {"A": (rank, num_in), "B": (num_out, rank)}.items():
            found = shapes[names[side]]
            if found != expected:
                raise self._error(
                    f"has {names[side]} of shape {found}, the model and rank {rank} mean {expected}",
                    hint="it was made for another model, or its adapter_config.json is another one's",
                )
        return LowRankPair(names["A"], names["B"], num_in, num_out, rank, self._config.scale_of(module))

    def _linears_of(self, index: int) -> dict[str, tuple[int, int]]:
        kind = self._architecture.kind(index)
        if kind not in self._linears:
            self._linears[kind] = self._architecture.layers.linear_shapes(index)
        return self._linears[kind]

    def _not_served(self, tensor: str, served: str = "") -> WeightsError:
        return self._error(
            f"has {tensor}, which is no lora_A or lora_B of a linear module of a block"
            + (f": {served}" if served else ""),
            hint="embeddings and head are the client's, experts of sparse layers are not adapted: train it for "
            "the other linear modules alone",
        )

    def _error(self, what: str, hint: str) -> WeightsError:
        return WeightsError(f"adapter {self._adapter}: {ADAPTER_FILE} {what}", hint=hint)


class AdapterFile:
    """The safetensors file of ``adapter``, fetched to ``path``. WeightsError where it cannot be read."""

    def __init__(self, adapter: str, path: Path) -> None:
        self._path = path
        self._label = f"adapter {adapter}: {ADAPTER_FILE}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, from the header."""
        check_readable(self._path)
        try:
            with safe_open(self._path, framework="pt", device="cpu") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise WeightsError(
                f"{self._label} has no valid safetensors header: {error}", hint=_MAKE_AGAIN
            ) from error

    def check_values(self, pairs: BlockPairs) -> None:
        """WeightsError for dtypes that are not read, and values that are not finite."""
        for name, tensor in self._tensors(pairs).items():
            check_values(name, tensor, self._label)

    def read(self, pairs: BlockPairs, dtype: torch.dtype, device: torch.device) -> dict[str, LowRankFactors]:
        """In ``dtype`` on ``device``, by module."""
        tensors = self._tensors(pairs)
        factors = {}
        for module, pair in pairs.items():
            # Copied: what is read is mapped from the file, which somebody may change.
            a = tensors[pair.a].to(dtype, copy=True)
            b = (tensors[pair.b].float() * pair.scale).to(dtype)
            # Either may be too large for float16 though what is stored is not.
            check_values(f"{pair.a}, in {dtype},", a, self._label)
            check_values(f"{pair.b}, times {pair.scale:g} in {dtype},", b, self._label)
            factors[module] = LowRankFactors(a.to(device), b.to(device))
        return factors

    def _tensors(self, pairs: BlockPairs) -> dict[str, torch.Tensor]:
        names = [name for pair in pairs.values() for name in (pair.a, pair.b)]
        return read_file(self._path, self._label, names)
