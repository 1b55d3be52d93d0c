"""What a ``config.json`` describes: the facts of the model, and how its blocks can be computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from petalsd.models.block_config import FUSED_FAMILIES, BlockConfig
from petalsd.models.head_rule import HeadRule
from petalsd.models.hf.config_faults import made_from
from petalsd.models.hf.families import family_of
from petalsd.models.hf.family import Family
from petalsd.models.hf.layer import Layers
from petalsd.models.model_config import ModelConfig, check_sizes, common_facts, read_hf_config, text_part
from petalsd.models.source import ModelSource
from petalsd.models.weights import block_tensors


@dataclass(frozen=True, slots=True)
class Architecture:
    """``fused`` is the same as ``config`` for the families that have a fused block, else None."""

    config: ModelConfig
    fused: BlockConfig | None
    layers: Layers

    def kind(self, index: int) -> str:
        """As ``Layers.kind``."""
        return self.layers.kind(index)

    def head_rule(self) -> HeadRule:
        """What stands around the blocks. UnsupportedModel where this client cannot have it, or ModelError."""
        return made_from(self.layers.hf, "the head", self.layers.family.head)

    def largest_block(self) -> list[tuple[int, ...]]:
        """The shapes of its tensors, in a checkpoint."""
        if self.fused is not None:
            return list(block_tensors(self.fused, 0).values())
        firsts = {self.kind(index): index for index in range(self.config.num_blocks)}
        return max((self.layers.shapes(index) for index in firsts.values()), key=_num_elements)

    def tensor_names(self, index: int, source: ModelSource) -> list[str]:
        """The tensors that block ``index`` is read from. Raises WeightsError."""
        if self.fused is not None:
            return list(block_tensors(self.fused, index))
        return list(self.layers.tensor_shapes(index, source))

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Architecture:
        """Of a ``config.json``. UnsupportedModel: a family or feature that is not served; ModelError: nonsense.

        Of a model of text and images it is the text model, where that is a family of the table.
        """
        raw = text_part(raw)
        family = family_of(raw.get("model_type"))
        hf = read_hf_config(str(raw["model_type"]), raw, family.quantized)
        layers = Layers(family, hf)
        if raw["model_type"] in FUSED_FAMILIES:
            fused = BlockConfig.from_hf(raw)
            return cls(fused, fused, layers)
        config = made_from(hf, "its sizes", partial(_facts, family, raw))
        check_sizes(config)
        return cls(config, None, layers)


def _facts(family: Family, raw: Mapping[str, Any], hf: Any) -> ModelConfig:
    facts = {**common_facts(hf, raw), **family.facts(hf)}
    return ModelConfig(**facts, windows=family.windows(hf))


def _num_elements(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
