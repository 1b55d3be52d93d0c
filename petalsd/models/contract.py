"""What the engine and the daemon need of a model's blocks, whoever computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from petalsd.models.model_config import ModelConfig
from petalsd.models.paged_span import CosSin
from petalsd.ops.ragged import PagedKV, RaggedBatch


class Block(Protocol):
    """One block with its weights. ``TransformerBlock`` and ``LayerBlock`` are ones.

    adapted  the same block with each of the adapters that it was loaded with, by their names; None where an
             adapter has nothing for it: a block that held itself would keep its memory
    """

    adapted: Mapping[str, Block | None]

    @property
    def index(self) -> int: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def nbytes(self) -> int:
        """What the weights take."""

    def forward_paged(
        self, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        """Write the new tokens' K and V into the pages and attend over them. Call it under inference mode.

        hidden   ``[T, M]`` in the block's dtype
        cos_sin  of ``batch.positions``, from the model's ``Angles``; the same for all blocks

        Returns ``[T, M]``, a new tensor.
        """

    def forward_dense(self, hidden: torch.Tensor) -> torch.Tensor:
        """Whole sequences from position 0 without a cache, differentiable with respect to ``hidden``.

        hidden ``[B, n, M]`` in the block's dtype; returns ``[B, n, M]``.
        """


def with_adapter(block: Block, name: str | None) -> Block:
    """The block as this adapter of it computes; without one itself."""
    return block if name is None else block.adapted[name] or block


class Angles(Protocol):
    """Rotary angles for a model's blocks; computed once per batch. ``Rope`` and ``LayerAngles`` are ones."""

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""

    @property
    def device(self) -> torch.device: ...

    @property
    def is_length_dependent(self) -> bool:
        """Whether a token's angles depend on the length of its row."""

    def cos_sin(
        self, positions: torch.Tensor, seq_lens: torch.Tensor | None = None, end: int | None = None
    ) -> CosSin:
        """For tokens at ``positions`` ``[T]`` int64; ``seq_lens`` and ``end`` as in ``Rope.cos_sin``.

        Tensors of ``[T, …]``; which of them a block takes is between the block and its model's angles.
        """

    def tables(self, end: int) -> CosSin:
        """What ``cos_sin`` selects from at positions below ``end``, unless a row's length matters."""
