"""What a client computes itself, read from a checkpoint: a part of it that holds none of the blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

from petalsd.models.head_rule import HeadRule
from petalsd.models.model_config import ModelConfig
from petalsd.models.source import ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.models.weights import Placement, read_tensors
from petalsd.ops.packed_weight import PackedWeight, WeightFormat

_CPU = torch.device("cpu")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HeadVectors:
    """The small tensors of a head, shaped as in ``HeadNames``; None where the family has none."""

    norm: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None
    embedding_norm: torch.Tensor | None = None
    embedding_norm_bias: torch.Tensor | None = None
    positions: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """Embeddings and output head ``[V, M]``; with tied embeddings they are the same tensor."""

    embed_tokens: torch.Tensor
    lm_head: torch.Tensor
    vectors: HeadVectors


@dataclass(frozen=True, slots=True)
class PackedHeadWeights:
    """The same, packed for the CPU; ``dtype`` is that of the vectors, and of what is computed."""

    embed_tokens: PackedWeight
    lm_head: PackedWeight
    vectors: HeadVectors
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class HeadTensors:
    """Names in a checkpoint, and the shapes of what they name."""

    embeddings: str
    output: str
    vectors: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, source: ModelSource, config: ModelConfig, rule: HeadRule) -> HeadTensors:
        """Those that ``load_head`` reads: of tied tables each that there is."""
        names, index = rule.names, source.index()
        prefix = next((one for one in names.prefixes if one + names.embeddings in index), names.prefixes[0])
        table = (config.vocab_size, config.hidden_size)
        embeddings, output = prefix + names.embeddings, names.output
        if config.tie_word_embeddings and output not in index:
            output = embeddings
        elif config.tie_word_embeddings and embeddings not in index:
            embeddings = output
        sizes = {
            "output_bias": table[:1],
            "positions": (config.max_positions + rule.first_position, config.hidden_size),
        }
        vectors: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {embeddings: table, output: table}
        for field in fields(HeadVectors):
            name = getattr(names, field.name)
            if name is not None:
                full_name = name if field.name == "output_bias" else prefix + name
                vectors[field.name] = full_name
                shapes[full_name] = sizes.get(field.name, table[1:])
        return cls(embeddings, output, vectors, shapes)

    def tied(self) -> HeadTensors:
        """With the embeddings as output."""
        shapes = {name: shape for name, shape in self.shapes.items() if name != self.output}
        return replace(
            self, output=self.embeddings, shapes={**shapes, self.embeddings: self.shapes[self.embeddings]}
        )


def load_head(source: ModelSource, config: ModelConfig, rule: HeadRule, dtype: torch.dtype) -> HeadWeights:
    """Read a head to the CPU, cast to ``dtype``. Raises WeightsError."""
    return _Reading(source, config, rule).plain(dtype)


def load_packed_head(
    source: ModelSource, config: ModelConfig, rule: HeadRule, dtype: torch.dtype
) -> PackedHeadWeights | HeadWeights:
    """As ``load_head``, packed where there is a format for ``dtype``.

    For float32 a checkpoint in bfloat16 stays in bfloat16: the values are the same, and half as many bytes.
    """
    reading = _Reading(source, config, rule)
    is_exact = dtype == torch.float32 and reading.stored_dtypes == {torch.bfloat16}
    format = WeightFormat.BFLOAT16 if is_exact else WeightStorage.choose(dtype, _CPU).format
    return reading.plain(dtype) if format is None else reading.packed(dtype, format)


class _Reading:
    """A head's tensors, mapped from their files."""

    def __init__(self, source: ModelSource, config: ModelConfig, rule: HeadRule) -> None:
        names = HeadTensors.of(source, config, rule)
        self._tensors = read_tensors(source, names.shapes)
        # Tables that differ are not tied, whatever config.json says: fine-tuning can part them.
        is_tied = config.tie_word_embeddings and self._are_equal(names.embeddings, names.output)
        self._names = names.tied() if is_tied else names

    def _are_equal(self, first: str, second: str) -> bool:
        one, other = self._tensors[first], self._tensors[second]
        return one.dtype == other.dtype and torch.equal(one, other)

    @property
    def stored_dtypes(self) -> set[torch.dtype]:
        """Of the tables."""
        return {self._tensors[name].dtype for name in (self._names.embeddings, self._names.output)}

    def plain(self, dtype: torch.dtype) -> HeadWeights:
        place = self._placement(dtype, None)
        tables = self._tables(lambda name: place.fuse([name]))
        return HeadWeights(*tables, self._vectors(place))

    def packed(self, dtype: torch.dtype, format: WeightFormat) -> PackedHeadWeights:
        place = self._placement(dtype, format)
        tables = self._tables(lambda name: place.pack([name], format))
        return PackedHeadWeights(*tables, self._vectors(place), dtype)

    def _placement(self, dtype: torch.dtype, format: WeightFormat | None) -> Placement:
        storage = WeightStorage(dtype, _CPU, format)
        return Placement(self._tensors.__getitem__, "", storage, self._names.shapes.values())

    def _tables(self, read: Callable[[str], T]) -> tuple[T, T]:
        embeddings = read(self._names.embeddings)
        is_tied = self._names.output == self._names.embeddings
        return embeddings, embeddings if is_tied else read(self._names.output)

    def _vectors(self, place: Placement) -> HeadVectors:
        return HeadVectors(**{field: place.fuse([name]) for field, name in self._names.vectors.items()})
