"""Attention of one new token per row over pages, its context cut into splits; and the combination of the splits.

The last of a few splits to come combines them; many are combined by a launch of its own, which spreads that out.

The query heads of a KV head are the rows of one matrix product, so keys and values are read once for all of them.
Lengths and pages are read on the device and the grid depends on neither: a launch can be captured in a graph.
"""

import triton
import triton.language as tl

from petalsd.kernels.attention_tile import (
    LOG2E,
    NO_ALIBI,
    attention_biases,
    softmax_step,
    tile_scores,
    tile_slots,
)


@triton.jit(do_not_specialize=["block"])
def paged_decode(
    q, k, v, k_scales, v_scales, out,
    part_acc, part_greatest, part_total, arrivals,
    origins, context_lens, slopes, sinks,
    block, scale, softcap, alibi_factor,
    q_row_stride, out_row_stride, origins_stride,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, MIN_TILES: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, SCALED: tl.constexpr,
    COMBINES: tl.constexpr,
):  # fmt: skip
    """Grid (B, Hkv * ceil(G / BM), SPLITS).

    q, out         ``[B, H, D]``, of contiguous rows; out is written when SPLITS is 1 and with COMBINES, else the
                   partial results are left to `combine_splits`
    part_acc       float32 ``[B, H, SPLITS, D]``; part_greatest, part_total: float32 ``[B, H, SPLITS]``
    arrivals       int32, one for each program of one split, zeros before and after. With COMBINES the last split
                   to come combines all of them
    k, v           ``[N, PAGE, Hkv, D]``; k_scales, v_scales: float32 ``[N, PAGE, Hkv]``, with SCALED; contiguous
    origins        int32 ``[B, …]``; context_lens: int32 ``[B]``, 0 gives zeros
    slopes, sinks  float32 ``[H]``, with ALIBI and SINKS
    WINDOW         tokens that a query sees, itself included; 0: all
    """
    row = tl.program_id(0)
    HEAD_PARTS: tl.constexpr = (G + BM - 1) // BM
    kv_head = tl.program_id(1) // HEAD_PARTS
    split = tl.program_id(2)
    context = tl.load(context_lens + row)

    in_group = (tl.program_id(1) % HEAD_PARTS) * BM + tl.arange(0, BM)
    is_head = in_group < G
    head = kv_head * G + in_group
    dims = tl.arange(0, DP)
    is_dim = dims < D
    is_element = is_head[:, None] & is_dim[None, :]

    first = 0
    if WINDOW > 0:
        # Tiles start at multiples of BN whatever the window, so that no tile reads before the context.
        first = tl.maximum(context - WINDOW, 0) // BN * BN
    num_tiles = tl.cdiv(context - first, BN)
    tiles_per_split = tl.maximum(tl.cdiv(num_tiles, SPLITS), MIN_TILES)
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, num_tiles)

    part = (row * (HKV * G) + head) * SPLITS + split
    if SPLITS > 1 and not COMBINES:  # noqa: SIM102 - constants, and a number of the device
        if begin >= end:
            tl.store(part_greatest + part, float("-inf"), mask=is_head)
            tl.store(part_total + part, 0.0, mask=is_head)
            return

    elements = head[:, None] * D + dims[None, :]
    queries = tl.load(q + row.to(tl.int64) * q_row_stride + elements, mask=is_element, other=0.0)
    greatest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    if SINKS:  # noqa: SIM102 - likewise
        if split == 0:  # else every split would count it
            greatest = tl.load(sinks + head, mask=is_head, other=0.0) * LOG2E
            total += 1.0
    if ALIBI != NO_ALIBI:
        head_slopes = tl.load(slopes + head, mask=is_head, other=0.0)

    row_origins = origins + row.to(tl.int64) * origins_stride
    k_head = k + kv_head * D + dims[:, None]
    v_head = v + kv_head * D + dims[None, :]
    for tile in range(begin, end):
        start = first + tile * BN
        keys = start + tl.arange(0, BN)
        is_inside = keys < context
        slots = tile_slots(row_origins, block, start, context, PAGE, BN)
        k_tile = tl.load(
            k_head + slots[None, :] * (HKV * D), mask=is_dim[:, None] & is_inside[None, :], other=0.0
        )
        v_tile = tl.load(
            v_head + slots[:, None] * (HKV * D), mask=is_inside[:, None] & is_dim[None, :], other=0.0
        )
        k_factor = scale  # not used
        v_factor = scale
        if SCALED:
            k_factor = tl.load(k_scales + slots * HKV + kv_head, mask=is_inside, other=0.0)
            v_factor = tl.load(v_scales + slots * HKV + kv_head, mask=is_inside, other=0.0)
        scores = tile_scores(queries, k_tile, k_factor, scale, softcap, SOFTCAP, SCALED)
        if ALIBI != NO_ALIBI:
            scores += attention_biases(head_slopes, alibi_factor, keys, context - 1, ALIBI) * LOG2E
        is_seen = is_inside
        if WINDOW > 0:
            is_seen = is_seen & (keys >= context - WINDOW)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        greatest, total, acc = softmax_step(
            scores, v_tile, v_factor, greatest, total, acc, queries.dtype, SCALED
        )

    if SPLITS == 1:
        result = acc / tl.where(total == 0, 1.0, total)[:, None]
        out_row = out + row.to(tl.int64) * out_row_stride
        tl.store(out_row + elements, result.to(out.dtype.element_ty), mask=is_element)
    else:
        tl.store(part_greatest + part, greatest, mask=is_head)
        tl.store(part_total + part, total, mask=is_head)
        tl.store(part_acc + part[:, None].to(tl.int64) * D + dims[None, :], acc, mask=is_element)
        if COMBINES:
            tl.debug_barrier()  # all threads have stored before one of them says so
            arrived = arrivals + row * tl.num_programs(1) + tl.program_id(1)
            if tl.atomic_add(arrived, 1, sem="acq_rel") == SPLITS - 1:
                result = combine_heads(
                    part_acc, part_greatest, part_total, part - split, is_head, is_element, dims, D, SPLITS
                )
                out_row = out + row.to(tl.int64) * out_row_stride
                tl.store(out_row + elements, result.to(out.dtype.element_ty), mask=is_element)
                tl.store(arrived, 0)  # as the next launch expects it


@triton.jit
def combine_heads(
    part_acc, part_greatest, part_total, first, is_head, is_element, dims, D: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The result ``[BM, DP]`` of heads whose first parts are ``first`` ``[BM]``; few splits, whose loads all start
    at once. In the order of the splits, whatever that of their arrival.
    """
    highest = tl.full(first.shape, float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        greatest = tl.load(
            part_greatest + first + split, mask=is_head, other=float("-inf"), cache_modifier=".cg"
        )
        highest = tl.maximum(highest, greatest)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    acc = tl.zeros(is_element.shape, tl.float32)
    total = tl.zeros(first.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        part = first + split
        greatest = tl.load(part_greatest + part, mask=is_head, other=float("-inf"), cache_modifier=".cg")
        weight = tl.exp2(greatest - highest)
        places = part_acc + part[:, None].to(tl.int64) * D + dims[None, :]
        acc += weight[:, None] * tl.load(places, mask=is_element, other=0.0, cache_modifier=".cg")
        total += weight * tl.load(part_total + part, mask=is_head, other=0.0, cache_modifier=".cg")
    return acc / tl.where(total == 0, 1.0, total)[:, None]


@triton.jit
def combine_splits(
    part_acc, part_greatest, part_total, out, out_row_stride,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (B, H): the result ``[B, H, D]`` of what `paged_decode` left; CHUNK splits are held at once.

    A row of which no split has seen a token, a padding row, gets zeros.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    dims = tl.arange(0, DP)
    is_dim = dims < D
    base = (row * H + head) * SPLITS
    highest = tl.max(tl.load(part_greatest + base + tl.arange(0, SPLITS)), 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    acc = tl.zeros([DP], tl.float32)
    total = 0.0
    for start in range(0, SPLITS, CHUNK):
        part = base + start + tl.arange(0, CHUNK)
        part_sums = tl.load(part_total + part)
        weights = tl.exp2(tl.load(part_greatest + part) - highest)
        # What an empty split left in part_acc is undefined, NaN perhaps: it is not read.
        is_read = (part_sums > 0)[:, None] & is_dim[None, :]
        values = tl.load(part_acc + part[:, None].to(tl.int64) * D + dims[None, :], mask=is_read, other=0.0)
        total += tl.sum(part_sums * weights, 0)
        acc += tl.sum(values * weights[:, None], 0)
    result = acc / tl.where(total == 0, 1.0, total)
    place = out + row.to(tl.int64) * out_row_stride + head * D + dims
    tl.store(place, result.to(out.dtype.element_ty), mask=is_dim)
