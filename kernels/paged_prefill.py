"""Attention of rows with any number of new tokens over pages that already hold these tokens' keys and values."""

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


@triton.jit
def row_of_program(row_starts, num_rows, program, BQ: tl.constexpr):
    """The row that a program works on, by bisection.

    Row r has the programs from ``row_starts[r] // BQ + r`` on: as many as there may be at most for its queries,
    of which the last can be idle. So the grid needs no number but that of the tokens and rows.
    """
    low = 0
    high = num_rows  # the row is in low .. high - 1
    while high - low > 1:
        middle = (low + high) // 2
        is_later = tl.load(row_starts + middle) // BQ + middle <= program
        low = tl.where(is_later, middle, low)
        high = tl.where(is_later, high, middle)
    return low


@triton.jit
def attend_tiles(
    begin, end, queries, greatest, total, acc,
    k_head, v_head, k_scales, v_scales, origins, slopes, positions, last,
    kv_head, block, scale, softcap, alibi_factor,
    HKV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys ``begin .. end - 1`` in tiles; without MASKED every query sees all of them.

    k_head, v_head: the places of the KV head in slot 0. positions ``[BM]``; last: the last position that any query
    sees.
    """
    is_dim = tl.arange(0, DP) < D
    for start in range(begin, end, BN):
        keys = start + tl.arange(0, BN)
        is_inside = keys <= last
        slots = tile_slots(origins, block, start, last + 1, PAGE, BN)
        k_mask = is_dim[:, None]
        v_mask = is_dim[None, :]
        if MASKED:
            k_mask = k_mask & is_inside[None, :]
            v_mask = v_mask & is_inside[:, None]
        k_tile = tl.load(k_head + slots[None, :] * (HKV * D), mask=k_mask, other=0.0)
        v_tile = tl.load(v_head + slots[:, None] * (HKV * D), mask=v_mask, other=0.0)
        k_factor = scale  # not used
        v_factor = scale
        if SCALED:
            k_factor = tl.load(k_scales + slots * HKV + kv_head, mask=is_inside, other=0.0)
            v_factor = tl.load(v_scales + slots * HKV + kv_head, mask=is_inside, other=0.0)
        scores = tile_scores(queries, k_tile, k_factor, scale, softcap, SOFTCAP, SCALED)
        if ALIBI != NO_ALIBI:
            scores += attention_biases(slopes, alibi_factor, keys, last, ALIBI) * LOG2E
        if MASKED:
            if WINDOW > 0:
                # A later key is at a negative distance, which unsigned is past any window.
                distance = positions[:, None] - keys[None, :]
                is_seen = distance.to(tl.uint32, bitcast=True) < WINDOW
            else:
                is_seen = keys[None, :] <= positions[:, None]
            scores = tl.where(is_seen, scores, float("-inf"))
        greatest, total, acc = softmax_step(
            scores, v_tile, v_factor, greatest, total, acc, queries.dtype, SCALED
        )
    return greatest, total, acc


@triton.jit(do_not_specialize=["block", "num_rows"])
def paged_prefill(
    q, k, v, k_scales, v_scales, out,
    origins, row_starts, context_lens, slopes, sinks,
    num_rows, block, scale, softcap, alibi_factor,
    q_token_stride, out_token_stride, origins_stride,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    BQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid (T // BQ + R, Hkv). The G query heads of a KV head and BQ tokens are the rows of a product.

    q, out         ``[T, H, D]``, of contiguous tokens
    row_starts     int32 ``[R + 1]``; context_lens: int32 ``[R]``, new tokens included
    BQ             tokens of a program: BQ * G is at most BM

    The others as in `paged_decode`.
    """
    row = row_of_program(row_starts, num_rows, tl.program_id(0), BQ)
    kv_head = tl.program_id(1)
    row_start = tl.load(row_starts + row)
    num_queries = tl.load(row_starts + row + 1) - row_start
    first_query = (tl.program_id(0) - row_start // BQ - row) * BQ
    if first_query >= num_queries:
        return
    context = tl.load(context_lens + row)

    in_tile = tl.arange(0, BM)
    query = first_query + in_tile // G
    head = kv_head * G + in_tile % G
    is_query = (query < num_queries) & (in_tile < BQ * G)
    # Positions of queries that are not there are those of the last one: what they compute is finite and unused.
    positions = context - num_queries + tl.minimum(query, num_queries - 1)
    dims = tl.arange(0, DP)
    is_element = is_query[:, None] & (dims < D)[None, :]
    token = (row_start + query).to(tl.int64)
    elements = head[:, None] * D + dims[None, :]
    queries = tl.load(q + token[:, None] * q_token_stride + elements, mask=is_element, other=0.0)

    greatest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if SINKS:
        greatest = tl.load(sinks + head) * LOG2E
        total = total + 1.0
    head_slopes = total  # not used
    if ALIBI != NO_ALIBI:
        head_slopes = tl.load(slopes + head)
    acc = tl.zeros([BM, DP], tl.float32)

    oldest_query = context - num_queries + first_query
    last = tl.minimum(oldest_query + BQ, context) - 1
    begin = 0
    unmasked_end = (oldest_query + 1) // BN * BN  # up to here even the first query sees every key
    if WINDOW > 0:
        begin = tl.maximum(oldest_query + 1 - WINDOW, 0) // BN * BN
        unmasked_end = begin  # a window leaves few tiles that need no mask
    row_origins = origins + row.to(tl.int64) * origins_stride
    k_head = k + kv_head * D + dims[:, None]
    v_head = v + kv_head * D + dims[None, :]
    if WINDOW == 0:
        greatest, total, acc = attend_tiles(
            begin, unmasked_end, queries, greatest, total, acc,
            k_head, v_head, k_scales, v_scales, row_origins, head_slopes, positions, last,
            kv_head, block, scale, softcap, alibi_factor,
            HKV, D, DP, PAGE, BN, WINDOW, SOFTCAP, ALIBI, SCALED, False,
        )  # fmt: skip
    greatest, total, acc = attend_tiles(
        unmasked_end, last + 1, queries, greatest, total, acc,
        k_head, v_head, k_scales, v_scales, row_origins, head_slopes, positions, last,
        kv_head, block, scale, softcap, alibi_factor,
        HKV, D, DP, PAGE, BN, WINDOW, SOFTCAP, ALIBI, SCALED, True,
    )  # fmt: skip
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    out_place = out + token[:, None] * out_token_stride + elements
    tl.store(out_place, result.to(out.dtype.element_ty), mask=is_element)
