"""Attention of one new token per row over pages on a GPU; for captured graphs, too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from petalsd.kernels.paged_decode import combine_splits, paged_decode
from petalsd.ops.attention_checks import check_pages, check_queries, check_rows, scales_of
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_batch import DecodeBatch
from petalsd.ops.eight_bit_kv import Float8KV, Int8KV
from petalsd.ops.launching import Options, capability_of, launch, next_power_of_2, strides
from petalsd.ops.ragged import PagedKV

MAX_SPLITS = 64
MIN_TILES = 4
"""Tiles of keys that a split takes at least: below, a second split costs more than it saves."""

MOST_COMBINED = 8
"""Splits that the last program to come combines: it does alone what a launch of its own spreads out."""

_MIN_BLOCK_M = 16  # the smallest matrix product there are instructions for
_MAX_BLOCK_M = 32
_PROGRAMS_PER_SM = 4
_SPLITS_AT_ONCE = 16  # that the combination holds in registers
_MAX_REGISTERS = 255
_BLACKWELL = 100  # two warps spill there
_NUM_STAGES = 2


def num_splits(num_rows: int, num_kv_heads: int, num_sms: int, max_tiles: int) -> int:
    """Into how many parts contexts are cut, a power of two: enough programs to fill the device.

    num_rows, num_kv_heads  each pair has programs of its own
    num_sms                 multiprocessors of the device
    max_tiles               tiles of the longest context that there can be

    Static for a shape: the kernel reads on the device how long a row is and leaves splits idle.
    """
    wanted = _PROGRAMS_PER_SM * num_sms // max(1, num_rows * num_kv_heads)
    useful = min(wanted, max_tiles // MIN_TILES, MAX_SPLITS)
    return 1 << (max(1, useful).bit_length() - 1)


def decode_tile(group: int, kv: PagedKV) -> tuple[int, int, int]:
    """Query heads and tokens of a tile, and warps that share it: what no compiled variant spills with.

    Tiles of 8 bits pass through registers, to be raised to the dtype of the queries, so they hold fewer tokens; so
    do those of float32, which is multiplied from registers.
    """
    head_dim, is_eight_bit = kv.k.shape[-1], isinstance(kv, Int8KV | Float8KV)
    block_m = min(max(_MIN_BLOCK_M, next_power_of_2(group)), _MAX_BLOCK_M)
    is_padded = head_dim != next_power_of_2(head_dim)
    block_n = 64 if head_dim <= 128 else 32
    is_small = block_m == _MIN_BLOCK_M and head_dim <= 128
    num_warps = 2 if is_small and capability_of(kv.k.device) < _BLACKWELL else 4
    if is_eight_bit:
        block_n = 32 if head_dim <= 128 and not is_padded else 16
        num_warps = 4
    elif kv.k.dtype == torch.float32:
        block_n, num_warps = block_n // 2, 8
    return block_m, block_n, num_warps


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How batches of one size are attended to: made once, so that tensors and constants never change.

    block_m, block_n  query heads and tokens of a tile
    num_warps         that share a tile
    num_splits        parts of a context that are attended to side by side
    part_acc          float32 ``[B, H, num_splits, D]``, and
    part_greatest, part_total
                      float32 ``[B, H, num_splits]``: what the parts leave to be combined; None for one part.
                      Nothing in them outlives a call, so blocks share a plan
    arrivals          int32 ``[B, programs]``, zeros between calls: of few parts the last one to come combines all.
                      None: a launch of its own does
    """

    block_m: int
    block_n: int
    num_warps: int
    num_splits: int
    part_acc: torch.Tensor | None = None
    part_greatest: torch.Tensor | None = None
    part_total: torch.Tensor | None = None
    arrivals: torch.Tensor | None = None

    @classmethod
    def create(cls, num_rows: int, num_heads: int, kv: PagedKV, num_sms: int, max_context: int) -> DecodePlan:
        """For batches of ``num_rows`` rows, padding included.

        num_sms      multiprocessors of the device
        max_context  tokens that a row can attend to at most; of blocks with a window, the window
        """
        num_kv_heads = kv.k.shape[2]
        group = num_heads // num_kv_heads
        block_m, block_n, _ = decode_tile(group, kv)
        programs = num_kv_heads * -(-group // block_m)
        # A window that begins within a tile reaches into one more.
        splits = num_splits(num_rows, programs, num_sms, -(-max_context // block_n) + 1)
        return cls.of_splits(splits, num_rows, num_heads, kv)

    @classmethod
    def of_splits(cls, splits: int, num_rows: int, num_heads: int, kv: PagedKV) -> DecodePlan:
        """Of exactly so many splits, a power of two up to ``MAX_SPLITS``."""
        num_kv_heads, head_dim = kv.k.shape[2:]
        tile = decode_tile(num_heads // num_kv_heads, kv)
        if splits == 1:
            return cls(*tile, 1)
        parts = (num_rows, num_heads, splits)
        part_acc, part_greatest, part_total = (
            torch.empty(shape, dtype=torch.float32, device=kv.k.device)
            for shape in ((*parts, head_dim), parts, parts)
        )
        arrivals = None
        if splits <= MOST_COMBINED:
            programs = num_kv_heads * -(-num_heads // num_kv_heads // tile[0])
            arrivals = torch.zeros(num_rows, programs, dtype=torch.int32, device=kv.k.device)
        return cls(*tile, splits, part_acc, part_greatest, part_total, arrivals)


def plans_by_window(
    windows: Iterable[int | None],
    num_rows: int,
    num_heads: int,
    kv: PagedKV,
    num_sms: int,
    max_context: int,
) -> dict[int | None, DecodePlan]:
    """For batches of ``num_rows`` rows, by the windows that a model's blocks have; none without rows.

    They do not depend on the rows' lengths, or kernels would be compiled for new ones in the middle of serving.
    """
    if not num_rows:
        return {}
    return {
        window: DecodePlan.create(num_rows, num_heads, kv, num_sms, min(max_context, window or max_context))
        for window in windows
    }


def decode_attention(
    q: torch.Tensor,
    kv: PagedKV,
    batch: DecodeBatch,
    block: int,
    rule: AttentionRule,
    plan: DecodePlan,
    out: torch.Tensor,
) -> None:
    """Each row's new token attends to its context, itself included, whose keys and values are in the pages.

    q      ``[B, H, D]`` rotated; H is a multiple of the slab's Hkv, head h reads KV head ``h // (H / Hkv)``
    block  index of the block, which selects the page within each run
    out    ``[B, H, D]`` in q's dtype; zeros for rows whose ``context_lens`` is 0

    One launch, or two with many splits. ValueError for tensors that don't fit.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = kv.k.shape[2]
    check_pages(kv, q.dtype)
    check_queries("q", q, kv, q)
    check_queries("out", out, kv, q)
    check_rows(num_rows, batch.context_lens, batch.origins)
    if plan.part_acc is not None and plan.part_acc.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"the plan is for {list(plan.part_acc.shape[:2])} rows and heads, q has {list(q.shape[:2])}"
        )
    group = num_heads // num_kv_heads
    parts = (plan.part_acc, plan.part_greatest, plan.part_total)
    padded = next_power_of_2(head_dim)
    launch(
        paged_decode,
        (num_rows, num_kv_heads * -(-group // plan.block_m), plan.num_splits),
        (
            q, kv.k, kv.v, *scales_of(kv), out, *parts, plan.arrivals, batch.origins, batch.context_lens,
            rule.slopes, rule.sinks, block, *rule.numbers, strides(q)[0], strides(out)[0], batch.origins.stride(0),
        ),
        {
            "HKV": num_kv_heads, "G": group, "D": head_dim, "DP": padded, "PAGE": kv.page_tokens,
            "BM": plan.block_m, "BN": plan.block_n, "SPLITS": plan.num_splits, "MIN_TILES": MIN_TILES,
            "SCALED": isinstance(kv, Int8KV), "COMBINES": plan.arrivals is not None, **rule.constants,
        },
        Options(plan.num_warps, _NUM_STAGES, _MAX_REGISTERS),
    )  # fmt: skip
    if plan.num_splits > 1 and plan.arrivals is None:
        launch(
            combine_splits,
            (num_rows, num_heads),
            (*parts, out, strides(out)[0]),
            {
                "H": num_heads, "D": head_dim, "DP": padded,
                "SPLITS": plan.num_splits, "CHUNK": min(plan.num_splits, _SPLITS_AT_ONCE),
            },
            Options(num_warps=4, num_stages=1),
        )  # fmt: skip
