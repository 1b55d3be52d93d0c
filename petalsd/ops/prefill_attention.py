"""Attention of rows with any number of new tokens over pages on a GPU."""

from __future__ import annotations

import torch

from petalsd.kernels.paged_prefill import paged_prefill
from petalsd.ops.attention_checks import check_pages, check_queries, check_rows, scales_of
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_batch import PrefillBatch
from petalsd.ops.eight_bit_kv import Int8KV
from petalsd.ops.launching import Options, check_tensor, launch, next_power_of_2, strides
from petalsd.ops.ragged import PagedKV

_BLOCK_M, _BLOCK_N = 128, 64
_OPTIONS = Options(num_warps=8, num_stages=2)


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
    block_m, block_n = _tiles(head_dim)
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
        _OPTIONS,
    )  # fmt: skip


def _tiles(head_dim: int) -> tuple[int, int]:
    """Query rows and keys of a tile: what fits into the registers and the shared memory of every device."""
    return (_BLOCK_M, _BLOCK_N) if head_dim <= 128 else (64, 32)
