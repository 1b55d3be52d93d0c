"""Consecutive blocks as the engine's runner sees them, and the plain way to compute them: one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import torch

from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.types import BlockSpan

CosSin: TypeAlias = tuple[torch.Tensor, ...]
"""Cosines and sines, ``[T, …]`` each; several pairs where kinds of blocks rotate differently, or none at all."""


class PagedBlock(Protocol):
    """One block; ``TransformerBlock.forward_paged`` is the contract."""

    def forward_paged(
        self, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor: ...


class PagedSpan(Protocol):
    """Consecutive blocks, of which any consecutive ones can be asked for."""

    def forward_paged(
        self, blocks: BlockSpan, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        """``hidden`` ``[T, M]`` through ``blocks``; a new tensor, and otherwise as one block after the other."""


class BlockByBlock:
    """Any blocks, each in a call of its own."""

    def __init__(self, blocks: Mapping[int, PagedBlock]) -> None:
        self._blocks = blocks

    def forward_paged(
        self, blocks: BlockSpan, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        for block in blocks:
            hidden = self._blocks[block].forward_paged(hidden, kv, batch, cos_sin)
        return hidden


class ChainedSpans:
    """Spans of different kinds, one behind the other: ``parts``."""

    def __init__(self, parts: Sequence[tuple[BlockSpan, PagedSpan]]) -> None:
        self.parts = parts

    def forward_paged(
        self, blocks: BlockSpan, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        for served, part in self.parts:
            asked = served.intersect(blocks)
            if asked is not None:
                hidden = part.forward_paged(asked, hidden, kv, batch, cos_sin)
        return hidden
