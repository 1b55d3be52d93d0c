"""What a client computes itself around the remote blocks: embeddings and the output head, over packed weights.

One row against a whole vocabulary is bound by memory: packed weights stream at twice the speed of torch's product,
and where embeddings are tied both read the same storage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from petalsd import _C
from petalsd.models.head_rule import ScaledEmbedding
from petalsd.models.weights import HeadWeights, PackedHeadWeights
from petalsd.ops.packed_product import PackedProduct
from petalsd.ops.packed_weight import PackedWeight


class PackedEmbedding(nn.Module):
    """``ScaledEmbedding`` over a packed table; frozen."""

    def __init__(self, table: PackedWeight, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        self.scale = scale
        self.dtype = dtype

    @property
    def weight(self) -> torch.Tensor:
        """The table ``[V, M]``, unpacked at each access."""
        return self.table.unpack(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        looked_up = self.table.rows(input).to(self.dtype)
        return looked_up if self.scale == 1.0 else looked_up * looked_up.new_tensor(self.scale)


class PackedOutput(nn.Module):
    """A linear layer without bias over a packed weight; frozen."""

    def __init__(self, table: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        self.dtype = dtype
        self._product = PackedProduct(table, _C.LinearTeam(torch.get_num_threads(), "auto"))

    @property
    def weight(self) -> torch.Tensor:
        """The weight ``[V, M]``, unpacked at each access."""
        return self.table.unpack(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._product.multiply(input)


class LocalHead(nn.Module):
    """Embeddings, the weight of the final norm, and output head.

    On the CPU they stay packed if they come so; what is moved elsewhere, or cast, becomes plain tensors first.
    """

    def __init__(
        self, weights: HeadWeights | PackedHeadWeights, embedding_scale: float, norm_offset: float
    ) -> None:
        super().__init__()
        self._embedding_scale = embedding_scale
        self.norm = nn.Parameter(weights.norm + norm_offset, requires_grad=False)
        self.embed_tokens: nn.Module
        self.lm_head: nn.Module
        if isinstance(weights, PackedHeadWeights):
            dtype = weights.norm.dtype
            self.embed_tokens = PackedEmbedding(weights.embed_tokens, embedding_scale, dtype)
            self.lm_head = PackedOutput(weights.lm_head, dtype)
        else:
            self._set_tables(weights.embed_tokens, weights.lm_head)

    def _set_tables(self, embeddings: torch.Tensor, output: torch.Tensor) -> None:
        self.embed_tokens = ScaledEmbedding(embeddings, self._embedding_scale)
        head = nn.Linear(output.shape[1], output.shape[0], bias=False, device="meta")
        is_tied = output is embeddings
        head.weight = self.embed_tokens.weight if is_tied else nn.Parameter(output)
        self.lm_head = head
        self.requires_grad_(False)

    def _unpack(self, embeddings: PackedEmbedding, output: PackedOutput) -> None:
        table = embeddings.weight
        self._set_tables(table, table if output.table is embeddings.table else output.weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LocalHead:
        """torch's hook behind ``to``, ``half``, ``cuda`` and the like."""
        embeddings, output = self.embed_tokens, self.lm_head
        if isinstance(embeddings, PackedEmbedding) and isinstance(output, PackedOutput):
            probe = fn(self.norm.new_empty(0))
            if probe.dtype != self.norm.dtype or probe.device != self.norm.device:
                self._unpack(embeddings, output)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
