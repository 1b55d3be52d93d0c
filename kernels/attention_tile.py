"""What decode and prefill do with one tile of keys: scores, what is done to them, and the online softmax.

Symbols: ``BM`` query rows of a program, ``BN`` tokens of a tile, ``DP`` head size padded to a power of two.
Scores are in units of log2, so that the softmax takes exp2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# How positions become biases: see `attention_biases`.
NO_ALIBI = tl.constexpr(0)
ALIBI_DISTANCES = tl.constexpr(1)
ALIBI_ROUNDED = tl.constexpr(2)


@triton.jit
def capped(scores, softcap):
    """``softcap * tanh(scores / softcap)``, by exp2 of what is never positive, which cannot overflow."""
    ratio = scores / softcap
    small = tl.exp2(tl.abs(ratio) * (-2.0 * LOG2E))
    magnitude = (1.0 - small) / (1.0 + small)
    return softcap * tl.where(ratio < 0, -magnitude, magnitude)


@triton.jit
def rounded_to_bfloat16(x):
    """Finite float32 to the nearest bfloat16, ties to even, as float32: by its bits, so in the interpreter too."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded_biases(slopes, positions):
    """``slope * position`` with factors and product rounded to bfloat16, which the slopes already are."""
    return rounded_to_bfloat16(slopes * rounded_to_bfloat16(positions.to(tl.float32)))


@triton.jit
def attention_biases(slopes, factor, keys, anchor, ALIBI: tl.constexpr):
    """``[BM, BN]``: linear biases of keys ``[BN]``, up to what is the same for all keys of a query.

    Counted from ``anchor``, a position near the queries, and not from each query: the softmax of a query does not
    know the difference, distances are then the same for all rows of a tile, and still small enough to be exact.
    slopes ``[BM]`` float32, of each row's head. ALIBI_DISTANCES: slope times distance. ALIBI_ROUNDED: the
    difference of two products of slope and position, each rounded to bfloat16.
    """
    if ALIBI == ALIBI_ROUNDED:
        of_keys = rounded_biases(slopes[:, None], keys[None, :])
        return factor * (of_keys - rounded_biases(slopes, anchor)[:, None])
    return (factor * slopes)[:, None] * (keys - anchor).to(tl.float32)[None, :]


@triton.jit
def tile_slots(origins, block, start, end, PAGE: tl.constexpr, BN: tl.constexpr):
    """Slots ``[BN]`` of a row's tokens from ``start``, a multiple of BN.

    They are int64, since a slab holds more elements than int32 counts.

    Tokens from ``end`` on get a slot of memory that is real: of a page of the row, or of page 0, which is never
    allocated but exists. A page that a tile lies in, or has several of, is read once, as a number of the program.
    """
    offset = tl.arange(0, BN)
    if PAGE % BN == 0:
        page = tl.load(origins + start // PAGE) + block
        return page.to(tl.int64) * PAGE + start % PAGE + offset
    if BN % PAGE == 0:
        pages = tl.zeros([BN], tl.int32)
        for part in tl.static_range(BN // PAGE):
            first = start + part * PAGE
            page = 0
            if first < end:
                page = tl.load(origins + first // PAGE) + block
            pages = tl.where(offset // PAGE == part, page, pages)
        return pages.to(tl.int64) * PAGE + offset % PAGE
    keys = start + offset
    pages = tl.load(origins + keys // PAGE, mask=keys < end, other=0) + block
    return tl.where(keys < end, pages, 0).to(tl.int64) * PAGE + keys % PAGE


@triton.jit
def tile_scores(q, k, k_scales, scale, softcap, SOFTCAP: tl.constexpr, SCALED: tl.constexpr):
    """Scores ``[BM, BN]`` in float32, before biases and masks.

    q ``[BM, DP]``; k ``[DP, BN]`` in the slab's dtype; k_scales ``[BN]`` of int8 keys. The product is exact in
    float32 where q is: no TF32.
    """
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
    if SCALED:
        scores *= k_scales[None, :]
    if SOFTCAP:
        scores = capped(scores, softcap)
    return scores * LOG2E


@triton.jit
def softmax_step(scores, v, v_scales, greatest, total, acc, q_dtype: tl.constexpr, SCALED: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein, 2018).

    scores ``[BM, BN]``, -inf where masked; v ``[BN, DP]`` in the slab's dtype. greatest, total ``[BM]`` and acc
    ``[BM, DP]`` are float32; returns their new values. A row that has seen nothing stays at -inf, 0 and 0: -inf
    minus -inf, which is NaN, is never computed. Values are raised to the dtype of q and never the weights lowered
    to that of the values.

    Scales of int8 values are small: times a weight they would often be nothing in float16, so there it is the
    values that are scaled. bfloat16 has room for both.
    """
    new_greatest = tl.maximum(greatest, tl.max(scores, 1))
    subtracted = tl.where(new_greatest == float("-inf"), 0.0, new_greatest)
    weights = tl.exp2(scores - subtracted[:, None])
    shrink = tl.exp2(greatest - subtracted)
    total = total * shrink + tl.sum(weights, 1)
    if SCALED:
        if q_dtype == tl.float16:
            v = v.to(q_dtype) * v_scales.to(q_dtype)[:, None]
        else:
            weights *= v_scales[None, :]
    acc = acc * shrink[:, None] + tl.dot(weights.to(q_dtype), v.to(q_dtype), input_precision="ieee")
    return new_greatest, total, acc
