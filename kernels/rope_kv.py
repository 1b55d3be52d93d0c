"""Head norms, rotary embedding and the write of new keys and values into their pages, from one read of qkv."""

from __future__ import annotations

import triton
import triton.language as tl

from petalsd.kernels.float8 import to_float8


@triton.jit
def _split_heads(
    base, first, is_head, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """float32 ``[heads, half]`` twice, the two sides of each rotated pair, and ``[heads, rest]`` not rotated."""
    heads = base + first[:, None]
    half = tl.arange(0, HALF_BLOCK)
    rest = ROTARY + tl.arange(0, REST_BLOCK)
    if INTERLEAVED:
        pair = tl.arange(0, 2 * HALF_BLOCK)
        both = tl.load(heads + pair[None, :], mask=is_head[:, None] & (pair < ROTARY)[None, :], other=0.0)
        left, right = tl.split(tl.reshape(both, (first.shape[0], HALF_BLOCK, 2)))
    else:
        inside = is_head[:, None] & (half < ROTARY // 2)[None, :]
        left = tl.load(heads + half[None, :], mask=inside, other=0.0)
        right = tl.load(heads + ROTARY // 2 + half[None, :], mask=inside, other=0.0)
    tail = tl.load(heads + rest[None, :], mask=is_head[:, None] & (rest < HEAD_DIM)[None, :], other=0.0)
    return left.to(tl.float32), right.to(tl.float32), tail.to(tl.float32)


@triton.jit
def _rounded(part, dtype: tl.constexpr):
    """float32 to ``dtype``."""
    if dtype == tl.float8e4nv:
        return to_float8(part)
    return part.to(dtype)


@triton.jit
def _join_heads(
    base, first, is_head, left, right, tail, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """The inverse of ``_split_heads``, in the dtype of the memory."""
    heads = base + first[:, None]
    dtype = base.dtype.element_ty
    half = tl.arange(0, HALF_BLOCK)
    rest = ROTARY + tl.arange(0, REST_BLOCK)
    if INTERLEAVED:
        pair = tl.arange(0, 2 * HALF_BLOCK)
        both = tl.reshape(tl.join(left, right), (first.shape[0], 2 * HALF_BLOCK))
        tl.store(
            heads + pair[None, :], _rounded(both, dtype), mask=is_head[:, None] & (pair < ROTARY)[None, :]
        )
    else:
        inside = is_head[:, None] & (half < ROTARY // 2)[None, :]
        tl.store(heads + half[None, :], _rounded(left, dtype), mask=inside)
        tl.store(heads + ROTARY // 2 + half[None, :], _rounded(right, dtype), mask=inside)
    if ROTARY < HEAD_DIM:
        inside = is_head[:, None] & (rest < HEAD_DIM)[None, :]
        tl.store(heads + rest[None, :], _rounded(tail, dtype), mask=inside)


@triton.jit
def _is_finite(part):
    return tl.abs(part) < float("inf")


@triton.jit
def _greatest(part):
    """Of each head, over what is finite."""
    return tl.max(tl.where(_is_finite(part), tl.abs(part), 0.0), 1)


@triton.jit
def _head_scales(left, right, tail):
    """What takes each head's greatest value to 127; NaN for heads that are not finite."""
    greatest = tl.maximum(tl.maximum(_greatest(left), _greatest(right)), _greatest(tail))
    finite = tl.sum(_is_finite(left).to(tl.int32), 1) + tl.sum(_is_finite(right).to(tl.int32), 1)
    finite += tl.sum(_is_finite(tail).to(tl.int32), 1)
    return tl.where(finite == 2 * left.shape[1] + tail.shape[1], greatest / 127.0, float("nan"))


@triton.jit
def _whole(part, scale):
    """A part of heads as the nearest whole numbers of scales, ties to the even one; zeros without a scale."""
    rounder: tl.constexpr = (
        12582912.0  # 1.5 * 2^23: of a smaller number, adding it leaves the nearest whole one
    )
    inverse = 1.0 / tl.where(scale > 0, scale, 1.0)
    finite = tl.where((scale > 0)[:, None], part, 0.0)
    return (finite * inverse[:, None] + rounder) - rounder


@triton.jit
def _weigh(x, scale, q_weights, k_weights, is_q, columns, inside, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """A part of normed heads times the weights of q or k; rounded where transformers rounds."""
    normed = x * scale[:, None]
    if OFFSET == 0:
        normed = normed.to(dtype).to(tl.float32)
    of_q = tl.load(q_weights + columns, mask=inside, other=0.0).to(tl.float32)
    of_k = tl.load(k_weights + columns, mask=inside, other=0.0).to(tl.float32)
    weighed = normed * (tl.where(is_q[:, None], of_q[None, :], of_k[None, :]) + OFFSET)
    return weighed.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["block", "scale_page_stride", "scale_token_stride"])
def rope_kv_kernel(
    qkv,
    angles,
    angle_rows,
    q_weights,
    k_weights,
    q_out,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    write_origins,
    write_offsets,
    qkv_stride,
    q_token_stride,
    q_head_stride,
    k_page_stride,
    k_token_stride,
    k_head_stride,
    v_page_stride,
    v_token_stride,
    v_head_stride,
    scale_page_stride,
    scale_token_stride,
    block,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Grid (tokens, groups of HEADS_BLOCK of the heads of q, k and v); ``ops.rope_kv`` has shapes and meaning.

    Pairs are kept as two tiles, so that loads and stores are contiguous in either layout of the pairs.
    """
    token = tl.program_id(0).to(tl.int64)
    offset = tl.load(write_offsets + token).to(tl.int64)
    if offset < 0:
        return
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    is_head = head < NUM_HEADS + 2 * NUM_KV_HEADS
    left, right, tail = _split_heads(
        qkv + token * qkv_stride,
        head * HEAD_DIM,
        is_head,
        HEAD_DIM,
        ROTARY,
        INTERLEAVED,
        HALF_BLOCK,
        REST_BLOCK,
    )
    half = tl.arange(0, HALF_BLOCK)
    in_half = half < ROTARY // 2
    if q_weights is not None:
        dtype: tl.constexpr = qkv.dtype.element_ty
        squares = tl.sum(left * left, 1) + tl.sum(right * right, 1) + tl.sum(tail * tail, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)
        step: tl.constexpr = 2 if INTERLEAVED else 1
        apart: tl.constexpr = 1 if INTERLEAVED else ROTARY // 2
        rest = ROTARY + tl.arange(0, REST_BLOCK)
        normed = _weigh(left, scale, q_weights, k_weights, is_q, half * step, in_half, OFFSET, dtype)
        left = tl.where(is_v[:, None], left, normed)
        normed = _weigh(right, scale, q_weights, k_weights, is_q, half * step + apart, in_half, OFFSET, dtype)
        right = tl.where(is_v[:, None], right, normed)
        normed = _weigh(tail, scale, q_weights, k_weights, is_q, rest, rest < HEAD_DIM, OFFSET, dtype)
        tail = tl.where(is_v[:, None], tail, normed)
    if ROTARY > 0:
        of_token = angles + tl.load(angle_rows + token).to(tl.int64) * ROTARY
        cos = tl.load(of_token + half, mask=in_half, other=1.0)[None, :]
        sin = tl.load(of_token + ROTARY // 2 + half, mask=in_half, other=0.0)[None, :]
        rotated_left = tl.where(is_v[:, None], left, left * cos - right * sin)
        right = tl.where(is_v[:, None], right, right * cos + left * sin)
        left = rotated_left
    _join_heads(
        q_out + token * q_token_stride, head * q_head_stride, is_q, left, right, tail,
        HEAD_DIM, ROTARY, INTERLEAVED, HALF_BLOCK, REST_BLOCK,
    )  # fmt: skip
    page = tl.load(write_origins + token).to(tl.int64) + block
    if k_scales is not None:
        scale = _head_scales(left, right, tail)
        left, right, tail = _whole(left, scale), _whole(right, scale), _whole(tail, scale)
        place = page * scale_page_stride + offset * scale_token_stride + head - NUM_HEADS
        tl.store(k_scales + place, scale, mask=is_k)
        tl.store(v_scales + place - NUM_KV_HEADS, scale, mask=is_v)
    _join_heads(
        k_pages + page * k_page_stride + offset * k_token_stride, (head - NUM_HEADS) * k_head_stride,
        is_k, left, right, tail, HEAD_DIM, ROTARY, INTERLEAVED, HALF_BLOCK, REST_BLOCK,
    )  # fmt: skip
    v_head = head - NUM_HEADS - NUM_KV_HEADS
    _join_heads(
        v_pages + page * v_page_stride + offset * v_token_stride, v_head * v_head_stride,
        is_v, left, right, tail, HEAD_DIM, ROTARY, INTERLEAVED, HALF_BLOCK, REST_BLOCK,
    )  # fmt: skip
