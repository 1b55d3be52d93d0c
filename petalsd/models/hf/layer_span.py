"""Layers of transformers on a GPU, with attention by kernels: steps that can be captured as fused blocks' can.

Nothing here reads from the device, so that what a step launches, transformers' own operations among it, is the
same for every batch of its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from petalsd.models.hf.block import LayerBlock
from petalsd.models.paged_span import CosSin
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_attention import DecodePlan, plans_by_window
from petalsd.ops.decode_batch import KernelRows, kernel_rows
from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.ops.rope_kv import rope_and_write
from petalsd.ops.row_attention import attend_rows
from petalsd.ops.score_rule import ScoreRule
from petalsd.types import BlockSpan


@dataclass(slots=True)
class LayerStates:
    """What T tokens leave between captured steps: ``hidden`` ``[T, M]``. Every block uses the same memory."""

    hidden: torch.Tensor

    def first(self, tokens: int) -> LayerStates:
        """Those of the first tokens, a view."""
        return LayerStates(self.hidden[:tokens])

    def clear(self) -> None:
        """Zeros everywhere."""
        self.hidden.zero_()

    def enter(self, hidden: torch.Tensor) -> None:
        """``hidden`` ``[n, M]`` of the first n tokens is what enters the next block."""
        self.hidden[: len(hidden)].copy_(hidden)

    def leave(self, tokens: int) -> torch.Tensor:
        """What left the last block for the first tokens: ``[tokens, M]``, a new tensor."""
        return self.hidden[:tokens].clone()


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What a step needs beside its rows, and other steps of its size too; the tensors never move.

    tables  what the angles of the tokens are selected from, by position
    decode  by the window of a block; empty where no row has a single token
    """

    tables: CosSin
    decode: Mapping[int | None, DecodePlan]


class LayerSpan:
    """``PagedSpan`` of consecutive blocks whose attention kernels can compute. One call at a time.

    num_sms  multiprocessors of the device; None: asks it
    """

    def __init__(self, blocks: Mapping[int, LayerBlock], num_sms: int | None = None) -> None:
        first = next(iter(blocks.values()))
        self.span = BlockSpan(min(blocks), max(blocks) + 1)
        self.config, self.dtype, self.device = first.config, first.dtype, first.device
        self._num_sms = num_sms or torch.cuda.get_device_properties(self.device).multi_processor_count
        self._blocks = blocks
        self._angles = first.angles

    @property
    def is_capturable(self) -> bool:
        """Not where a token's angles depend on the length of its row, or a layer lets the host wait."""
        is_static = not self._angles.is_length_dependent
        return is_static and all(block.is_capturable for block in self._blocks.values())

    def forward_paged(
        self, blocks: BlockSpan, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        """As ``PagedSpan``. Rows of one token cost least where they come first.

        ``cos_sin`` may be empty where steps are capturable.
        """
        rows = kernel_rows(batch)
        angles = cos_sin or self._angles.cos_sin(batch.positions, end=batch.longest)
        return self._walk(blocks, hidden, rows, kv, angles, self._decode_plans(rows.num_decodes, kv))

    def make_states(self, tokens: int) -> LayerStates:
        size = (tokens, self.config.hidden_size)
        return LayerStates(torch.empty(size, dtype=self.dtype, device=self.device))

    def plan_decode(self, num_rows: int, kv: PagedKV, end: int) -> LayerPlan:
        """As ``KernelSpan.plan_decode``."""
        return LayerPlan(self._angles.tables(end), self._decode_plans(num_rows, kv))

    def source(self, block: int) -> LayerBlock:
        """What is computed; captured steps have the addresses of its weights."""
        return self._blocks[block]

    def compute(
        self, blocks: BlockSpan, states: LayerStates, rows: KernelRows, kv: PagedKV, plan: LayerPlan
    ) -> None:
        """The states through ``blocks``, in place; keys and values of the new tokens into their pages."""
        angles = tuple(table.index_select(0, rows.places.positions) for table in plan.tables)
        states.hidden.copy_(self._walk(blocks, states.hidden, rows, kv, angles, plan.decode))

    def _walk(
        self,
        blocks: BlockSpan,
        hidden: torch.Tensor,
        rows: KernelRows,
        kv: PagedKV,
        angles: CosSin,
        decode: Mapping[int | None, DecodePlan],
    ) -> torch.Tensor:
        positions = rows.places.positions.long()
        for index in blocks:
            block = self._blocks[index]
            call = KernelCall(kv, rows, block, decode.get(block.window))
            hidden = block.compute(hidden, angles, call, positions)
        return hidden

    def _decode_plans(self, num_rows: int, kv: PagedKV) -> Mapping[int | None, DecodePlan]:
        config = self.config
        # Of all the model's blocks, so that what is planned here serves other blocks of it too.
        windows = set(config.windows)
        return plans_by_window(windows, num_rows, config.num_heads, kv, self._num_sms, config.max_positions)


@dataclass(frozen=True, slots=True)
class KernelCall:
    """The attention of one block in one step, B = 1: ``AttentionCall`` by kernels, in three or four launches."""

    kv: PagedKV
    rows: KernelRows
    block: LayerBlock
    decode: DecodePlan | None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rule: ScoreRule | None
    ) -> torch.Tensor:
        block, num_heads = self.block, q.shape[1]
        if block.rule is None:
            block.rule = AttentionRule.of(scale, block.window, rule)
        heads = torch.cat([part.squeeze(0).transpose(0, 1) for part in (q, k, v)], dim=1)
        queries = heads[:, :num_heads]
        # They are rotated by the layer: the kernel leaves them as they are, and writes keys and values.
        rope_and_write(heads.flatten(1), queries, self.kv, self.rows.places, block.index, None)
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        attend_rows(queries, self.kv, self.rows, block.index, block.rule, self.decode, out)
        return out.unsqueeze(0)
