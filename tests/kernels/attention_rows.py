"""Rows in pages for the attention kernels: everything that no row has written is NaN, runs lie anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch

from petalsd.ops.attention_reference import reference_attention
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_attention import DecodePlan, decode_attention
from petalsd.ops.decode_batch import ORIGINS_MULTIPLE, DecodeBatch, PrefillBatch
from petalsd.ops.eight_bit_kv import Float8KV, Int8KV
from petalsd.ops.kv import write_kv
from petalsd.ops.prefill_attention import prefill_attention
from petalsd.ops.ragged import RaggedBatch
from petalsd.ops.score_rule import Alibi, ScoreRule
from tests.device import DEVICE
from tests.numeric import assert_close
from tests.paged_rows import PagedRows

F32, F16 = torch.float32, torch.float16
BLOCKS, BLOCK = 3, 1
TOLERANCE = {F32: 1e-5, F16: 2e-3}


class AttentionCase(NamedTuple):
    """What a kernel is compiled for; ``alibi`` is the dtype of the slopes, ``stored`` what the pages are."""

    group: int
    num_kv_heads: int
    head_dim: int
    page_tokens: int
    splits: int
    dtype: torch.dtype
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    alibi: torch.dtype | None = None
    stored: type[Int8KV | Float8KV] | None = None

    @property
    def num_heads(self) -> int:
        return self.group * self.num_kv_heads

    def rule(self) -> AttentionRule:
        slopes = torch.rand(self.num_heads) * 0.3 + 0.01
        rule = ScoreRule(
            softcap=self.softcap,
            alibi=None if self.alibi is None else Alibi(slopes.to(self.alibi), 0.5),
            sinks=torch.randn(self.num_heads) * 2 if self.has_sinks else None,
        )
        return AttentionRule.of(self.head_dim**-0.5, self.window, rule)

    def rows(self) -> AttentionRows:
        pages = PagedRows(BLOCKS, self.num_kv_heads, self.head_dim, self.page_tokens, 128, self.dtype)
        shape = pages.kv.k.shape
        if self.stored is not None:
            pages.kv = self.stored.allocate(tuple(shape), self.dtype, DEVICE)
            for slab in pages.kv.slabs:
                slab.fill_(torch.nan if slab.is_floating_point() else 127)  # NaN in float8
        return AttentionRows(self.num_heads, pages, self.dtype)


class AttentionRows:
    """Random queries in ``dtype``, and keys and values of one block in the pages of ``rows``."""

    def __init__(self, num_heads: int, rows: PagedRows, dtype: torch.dtype) -> None:
        self.num_heads = num_heads
        self.rows = rows
        self.dtype = dtype

    def append(self, new_tokens: Mapping[int, int]) -> tuple[torch.Tensor, RaggedBatch]:
        """Queries ``[T, H, D]`` of new tokens of these rows, whose keys and values are written."""
        while len(self.rows.lengths) <= max(new_tokens):
            self.rows.add_row()
        batch = self.rows.extend(dict(new_tokens))
        kv, count = self.rows.kv, batch.num_tokens
        num_kv_heads, head_dim = kv.k.shape[2:]
        k, v = (torch.randn(count, num_kv_heads, head_dim).to(self.dtype) for _ in range(2))
        write_kv(k, v, kv, batch, BLOCK)
        return torch.randn(count, self.num_heads, head_dim).to(self.dtype), batch

    def plan(self, num_rows: int, splits: int) -> DecodePlan:
        """A plan of exactly this many splits."""
        return DecodePlan.of_splits(splits, num_rows, self.num_heads, self.rows.kv)

    def check_decode(
        self, q: torch.Tensor, batch: RaggedBatch, rule: AttentionRule, plan: DecodePlan, padding: int = 0
    ) -> torch.Tensor:
        """Decode ``batch`` with ``padding`` rows behind it against the reference; returns the result."""
        padded = torch.cat([q, torch.full((padding, *q.shape[1:]), torch.nan, dtype=q.dtype)])
        out = torch.full_like(padded, torch.nan)
        decode_attention(padded, self.rows.kv, decode_batch(batch, padding), BLOCK, rule, plan, out)
        assert plan.arrivals is None or not plan.arrivals.any()
        lengths = [*batch.context_lens, *[0] * padding]
        self._compare(out, padded, batch, [(1, length) for length in lengths], rule)
        return out

    def check_prefill(self, q: torch.Tensor, batch: RaggedBatch, rule: AttentionRule) -> torch.Tensor:
        """Prefill ``batch`` against the reference; returns the result."""
        out = torch.full_like(q, torch.nan)
        prefill_attention(q, self.rows.kv, prefill_batch(batch), BLOCK, rule, out)
        bounds = batch.token_bounds
        counts = [end - start for start, end in pairwise(bounds)]
        self._compare(out, q, batch, list(zip(counts, batch.context_lens, strict=True)), rule)
        return out

    def _compare(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        batch: RaggedBatch,
        rows: list[tuple[int, int]],
        rule: AttentionRule,
    ) -> None:
        expected = reference_attention(q, self.rows.kv, batch.origins, rows, BLOCK, rule)
        tolerance = TOLERANCE[q.dtype]
        assert_close(out, expected, tolerance, tolerance, "attention")


def decode_batch(batch: RaggedBatch, padding: int = 0) -> DecodeBatch:
    """A batch of one token per row, with padding rows behind it, as the kernels read it."""
    zeros = torch.zeros(padding, dtype=torch.int32)
    return DecodeBatch(
        positions=torch.cat([batch.positions.int(), zeros]),
        context_lens=torch.cat([torch.tensor(batch.context_lens, dtype=torch.int32), zeros]),
        origins=_aligned(batch.origins, padding),
        write_origins=torch.cat([batch.write_origins.int(), zeros]),
        write_offsets=torch.cat([batch.write_offsets.int(), zeros - 1]),
    )


def prefill_batch(batch: RaggedBatch) -> PrefillBatch:
    """Any batch as the kernels read it."""
    return PrefillBatch(
        positions=batch.positions.int(),
        context_lens=torch.tensor(batch.context_lens, dtype=torch.int32),
        origins=_aligned(batch.origins),
        write_origins=batch.write_origins.int(),
        write_offsets=batch.write_offsets.int(),
        row_starts=torch.tensor(batch.token_bounds, dtype=torch.int32),
    )


def _aligned(origins: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """With rows as far apart as kernels want them; what is added is nonsense, as all that is undefined."""
    rows, width = origins.shape
    out = torch.full((rows + padding, -(-width // ORIGINS_MULTIPLE) * ORIGINS_MULTIPLE), 2**30)
    out[:rows, :width] = origins
    return out.int()
