"""LoRA adapters of a model, in the format of the PEFT library: blocks that compute with one beside the base's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch

from petalsd.models.adapter_config import ADAPTER_CONFIG_FILE, AdapterConfig
from petalsd.models.adapter_weights import ADAPTER_FILE, AdapterFile, BlockPairs, PairFinder
from petalsd.models.architecture import Architecture
from petalsd.models.block import TransformerBlock
from petalsd.models.contract import Block
from petalsd.models.hf.block import LayerBlock
from petalsd.models.source import ModelSource
from petalsd.models.weights import PROJECTIONS, block_tensors
from petalsd.ops.linear import Weight, linear
from petalsd.ops.low_rank import BaseProduct, LowRankFactors, LowRankUpdate, LowRankWeight
from petalsd.ops.packed_product import Product
from petalsd.ops.packed_weight import PackedWeight

MakeProduct: TypeAlias = Callable[[PackedWeight], Product]


class Adapter:
    """A LoRA adapter of a model, checked once; blocks take what is theirs. For one thread at a time."""

    def __init__(self, source: ModelSource, blocks: Mapping[int, BlockPairs]) -> None:
        self.name = source.name
        self._source = source
        self._blocks = blocks

    @classmethod
    def open(cls, source: ModelSource, architecture: Architecture) -> Adapter:
        """Fetch the adapter's two files, and check all that is in them.

        WeightsError says what is missing, damaged, made for another model or not computed here.
        """
        config = AdapterConfig.read(source.read_json(ADAPTER_CONFIG_FILE), source.name)
        file = _fetched(source)
        blocks = PairFinder(source.name, config, architecture).find(file.shapes())
        for pairs in blocks.values():
            file.check_values(pairs)
        return cls(source, blocks)

    def max_block_nbytes(self, dtype: torch.dtype) -> int:
        """The most memory that it takes beside one block."""
        return max(sum(pair.nbytes(dtype) for pair in pairs.values()) for pairs in self._blocks.values())

    def adapt(self, block: Block, make_product: MakeProduct) -> Block | None:
        """A block over the same weights, with this adapter's terms in the block's dtype on its device.

        None when the adapter has nothing for it; else its ``nbytes`` is what the terms take.
        ``make_product`` is what multiplies by packed weights of a fused block. Raises WeightsError when the file
        is gone, TypeError for another kind of block.
        """
        pairs = self._blocks.get(block.index)
        if pairs is None:
            return None
        file = _fetched(self._source)  # again: a full disk may have cost us the file
        factors = file.read(pairs, block.dtype, block.device)
        if isinstance(block, TransformerBlock):
            return _adapt_fused(block, factors, make_product)
        if isinstance(block, LayerBlock):
            return block.with_updates({name: LowRankUpdate([part]) for name, part in factors.items()})
        raise TypeError(f"a {type(block).__name__} cannot be adapted")


def _fetched(source: ModelSource) -> AdapterFile:
    return AdapterFile(source.name, source.fetch_weights(ADAPTER_FILE))


def _adapt_fused(
    block: TransformerBlock, factors: Mapping[str, LowRankFactors], make_product: MakeProduct
) -> TransformerBlock:
    shapes = block_tensors(block.config, block.index)
    replaced: dict[str, Any] = {}
    for projection, modules in PROJECTIONS.items():
        parts, start = [], 0
        for module in modules:
            if module in factors:
                parts.append(replace(factors[module], start=start))
            start += shapes[f"model.layers.{block.index}.{module}.weight"][0]
        weight = getattr(block.weights, projection)
        # A packed weight would be unpacked at every step where the block is not computed as a whole.
        if parts or isinstance(weight, PackedWeight):
            update = LowRankUpdate(parts) if parts else None
            replaced[projection] = LowRankWeight(_base_product(weight, make_product), update)
    return TransformerBlock(block.index, block.config, replace(block.weights, **replaced), block.rope)


def _base_product(weight: Weight, make_product: MakeProduct) -> BaseProduct:
    if isinstance(weight, PackedWeight):
        return make_product(weight).multiply
    return partial(_multiply, weight)


def _multiply(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return linear(x, weight, bias)
