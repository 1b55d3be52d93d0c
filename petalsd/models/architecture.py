"""What a ``config.json`` describes: the facts of the model, and how its blocks can be computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from petalsd.models.block_config import FUSED_FAMILIES, BlockConfig
from petalsd.models.head_rule import HeadRule
from petalsd.models.hf.families import family_of
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
        """Blocks of one kind differ in their weights alone."""
        return self.layers.family.kind(self.layers.hf, index)

    def head_rule(self) -> HeadRule:
        """What stands around the blocks. UnsupportedModel where this client cannot have it."""
        return self.layers.family.head(self.layers.hf)

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
        facts = {**common_facts(hf, raw), **family.facts(hf)}
        config = ModelConfig(**facts, windows=family.windows(hf))
        check_sizes(config)
        return cls(config, None, layers)


def _num_elements(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
