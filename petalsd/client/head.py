"""What a client computes itself around the remote blocks: embeddings and the output head, over packed weights.

One row against a whole vocabulary is bound by memory: packed weights stream at twice the speed of torch's product,
and where embeddings are tied both read the same storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import nn
from torch.nn import functional

from petalsd import _C
from petalsd.errors import BadRequest
from petalsd.models.head_rule import HeadRule, ScaledEmbedding
from petalsd.models.head_weights import HeadWeights, PackedHeadWeights
from petalsd.ops.norm import rms_norm
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
        self._product = PackedProduct(table, _C.LayerTeam(torch.get_num_threads(), "auto"))

    @property
    def weight(self) -> torch.Tensor:
        """The weight ``[V, M]``, unpacked at each access."""
        return self.table.unpack(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._product.multiply(input)


class LocalHead(nn.Module):
    """What a family has around its blocks; see ``HeadRule``.

    On the CPU the tables stay packed if they come so; when moved elsewhere, or cast, they become plain tensors.
    """

    norm: nn.Parameter | None
    norm_bias: nn.Parameter | None
    output_bias: nn.Parameter | None
    embedding_norm: nn.Parameter | None
    embedding_norm_bias: nn.Parameter | None
    positions: nn.Parameter | None
    anchor: torch.Tensor  # empty; of the dtype, and where, everything is computed

    def __init__(self, weights: HeadWeights | PackedHeadWeights, rule: HeadRule) -> None:
        super().__init__()
        self.rule = rule
        for field in fields(weights.vectors):
            value = getattr(weights.vectors, field.name)
            if field.name == "norm" and value is not None:
                value = value + rule.norm_offset
            self.register_parameter(field.name, None if value is None else nn.Parameter(value, False))
        self.embed_tokens: nn.Module
        self.lm_head: nn.Module
        if isinstance(weights, PackedHeadWeights):
            self.embed_tokens = PackedEmbedding(weights.embed_tokens, rule.embedding_scale, weights.dtype)
            self.lm_head = PackedOutput(weights.lm_head, weights.dtype)
            anchor = torch.empty(0, dtype=weights.dtype)
        else:
            self._set_tables(weights.embed_tokens, weights.lm_head)
            anchor = weights.embed_tokens.new_empty(0)
        self.register_buffer("anchor", anchor, persistent=False)

    def entering(
        self, embeds: torch.Tensor, position: int, padding: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """What enters the first block, from embeddings ``[B, n, M]`` of the tokens from ``position`` on.

        ``padding`` counts what each row begins with, and is no part of its positions.
        """
        if self.embedding_norm is not None:
            weight, bias = self.embedding_norm, self.embedding_norm_bias
            embeds = functional.layer_norm(embeds, embeds.shape[-1:], weight, bias, self.rule.norm_eps)
        if self.positions is not None:
            embeds = embeds + self._rows_of_positions(position, embeds.shape[1], padding or (0,))
        return embeds if self.rule.input_scale == 1.0 else embeds * self.rule.input_scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., V]`` from what leaves the last block, ``[..., M]``."""
        product = self.lm_head(self._normed(hidden))
        if self.output_bias is not None:
            product = product + self.output_bias
        return self.rule.logits(product)

    def _rows_of_positions(self, position: int, count: int, padding: tuple[int, ...]) -> torch.Tensor:
        """``[1 or B, n, M]``; padding has the first position's."""
        assert self.positions is not None
        first, room = self.rule.first_position, len(self.positions) - self.rule.first_position
        if position + count - min(padding) > room:
            raise BadRequest("position", position + count - min(padding), f"this model has {room} positions")
        columns = torch.arange(position, position + count, device=self.positions.device)
        places = columns - torch.tensor(padding, device=columns.device)[:, None]
        return self.positions[first + places.clamp_min(0)]

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.rule.norm == "none":
            return hidden
        if self.rule.norm == "layer":
            weight, bias = self.norm, self.norm_bias
            return functional.layer_norm(hidden, hidden.shape[-1:], weight, bias, self.rule.norm_eps)
        assert self.norm is not None
        return rms_norm(hidden, self.norm, self.rule.norm_eps)

    def _set_tables(self, embeddings: torch.Tensor, output: torch.Tensor) -> None:
        self.embed_tokens = ScaledEmbedding(embeddings, self.rule.embedding_scale)
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
            moved = fn(self.anchor)
            if moved.dtype != self.anchor.dtype or moved.device != self.anchor.device:
                self._unpack(embeddings, output)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
