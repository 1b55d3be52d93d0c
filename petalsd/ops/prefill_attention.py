"""Attention of rows with any number of new tokens over pages on a GPU."""

from __future__ import annotations

import torch

from petalsd.kernels.paged_prefill import paged_prefill
from petalsd.ops.attention_checks import check_pages, check_queries, check_rows, scales_of
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_batch import PrefillBatch
from petalsd.ops.eight_bit_kv import Float8KV, Int8KV
from petalsd.ops.launching import Options, check_tensor, launch, next_power_of_2, strides
from petalsd.ops.ragged import PagedKV

_OPTIONS = Options(num_warps=8, num_stages=2)
_BOUND = Options(num_warps=8, num_stages=2, max_registers=232)
"""Without a bound some registers are spilled to have 128 of them; with one, where about 200 are needed, too."""


def prefill_attention(
    q: torch.Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    block: int,
    rule: AttentionRule,
    out: torch.Tensor,
) -> None:
    """Each new token attends to its row's context up to itself, whose keys and values are in the pages.

    q      ``[T, H, D]`` rotated; H is a multiple of the slab's Hkv, head h reads KV head ``h // (H / Hkv)``
    block  index of the block, which selects the page within each run
    out    ``[T, H, D]`` in q's dtype

    One launch. ValueError for tensors that don't fit.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_rows, num_kv_heads = len(batch.context_lens), kv.k.shape[2]
    check_pages(kv, q.dtype)
    check_queries("q", q, kv, q)
    check_queries("out", out, kv, q)
    check_rows(num_rows, batch.context_lens, batch.origins)
    check_tensor("row_starts", batch.row_starts, (num_rows + 1,), torch.int32)
    group = num_heads // num_kv_heads
    block_m, block_n = prefill_tile(head_dim, rule, isinstance(kv, Int8KV | Float8KV))
    if group > block_m:
        raise ValueError(f"q has {group} heads to a KV head: at most {block_m} are served")
    block_q = block_m // group
    launch(
        paged_prefill,
        (num_tokens // block_q + num_rows if num_tokens else 0, num_kv_heads),
        (
            q, kv.k, kv.v, *scales_of(kv), out, batch.origins, batch.row_starts, batch.context_lens,
            rule.slopes, rule.sinks, num_rows, block, *rule.numbers,
            strides(q)[0], strides(out)[0], batch.origins.stride(0),
        ),
        {
            "HKV": num_kv_heads, "G": group, "D": head_dim, "DP": next_power_of_2(head_dim),
            "PAGE": kv.page_tokens, "BQ": block_q, "BM": block_m, "BN": block_n,
            "SCALED": isinstance(kv, Int8KV), **rule.constants,
        },
        _OPTIONS if 64 < head_dim <= 128 and not isinstance(kv, Float8KV) else _BOUND,
    )  # fmt: skip


def prefill_tile(head_dim: int, rule: AttentionRule, is_eight_bit: bool) -> tuple[int, int]:
    """Query rows and tokens of a tile: the largest that no device spills with, in the shared memory of all."""
    if head_dim > 128:
        return 64, 16
    # What is kept of positions, or converted on the way, takes the registers of half a tile.
    takes_more = rule.window is not None or rule.slopes is not None or is_eight_bit
    return 128, 32 if takes_more or head_dim <= 64 else 64
