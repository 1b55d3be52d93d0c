"""Attention of rows with any number of new tokens over pages on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from petalsd.kernels.paged_prefill import paged_prefill
from petalsd.ops.attention_checks import check_pages, check_queries, check_rows, scales_of
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_batch import PrefillBatch
from petalsd.ops.eight_bit_kv import Float8KV, Int8KV
from petalsd.ops.launching import Options, capability_of, check_tensor, launch, next_power_of_2, strides
from petalsd.ops.ragged import PagedKV

_UNBOUND = Options(num_warps=8, num_stages=2)
_BOUND = Options(num_warps=8, num_stages=2, max_registers=232)
"""Without a bound some registers are spilled to have 128 of them; with one, where about 200 are needed, too."""
_AHEAD = replace(_BOUND, num_stages=3)
"""With a third stage addresses and scales take fewer registers at a time."""


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
    tile = prefill_tile(head_dim, group, kv, q.dtype)
    if group > tile.block_m:
        raise ValueError(f"q has {group} heads to a KV head: at most {tile.block_m} are served")
    block_q = tile.block_m // group
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
            "PAGE": kv.page_tokens, "BQ": block_q, "BM": tile.block_m, "BN": tile.block_n,
            "SCALED": isinstance(kv, Int8KV), **rule.constants,
        },
        tile.options,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Query rows and tokens of a tile, and how the kernel is compiled for it."""

    block_m: int
    block_n: int
    options: Options


_HOPPER = 90
_SMALL = PrefillTile(64, 64, Options(num_warps=4, num_stages=2))


def prefill_tile(head_dim: int, group: int, kv: PagedKV, dtype: torch.dtype) -> PrefillTile:
    """What no device spills with, in the shared memory of all; ``dtype`` is that of the queries.

    Tiles of 64 rows and tokens were the fastest of those tried on an H200, where they suffice for the heads of a
    group; on other devices some of them spill.

    Tiles of 8 bits take registers to be raised to it, so they hold fewer tokens; but of small heads as many as are
    loaded in 16 bytes by every thread. Float32 is multiplied without matrix units, from registers.
    """
    if dtype == torch.float32:
        if head_dim > 128:
            return PrefillTile(32, 16, Options(num_warps=8, num_stages=2))
        num_warps = 8 if head_dim <= 64 else 16
        return PrefillTile(64, 16, Options(num_warps, num_stages=2, max_registers=128))
    is_eight_bit = isinstance(kv, Int8KV | Float8KV)
    if head_dim > 128:
        return PrefillTile(64, 16, _BOUND)
    is_hopper = capability_of(kv.k.device) == _HOPPER
    if is_hopper and not is_eight_bit and group <= _SMALL.block_m // 2:
        return _SMALL
    block_n = 64 if is_eight_bit == (head_dim <= 64) else 32
    if head_dim <= 64:
        return PrefillTile(128, block_n, _AHEAD if isinstance(kv, Int8KV) else _BOUND)
    if isinstance(kv, Float8KV):
        return PrefillTile(128, block_n, _AHEAD)
    return PrefillTile(128, block_n, _BOUND if is_eight_bit else _UNBOUND)
