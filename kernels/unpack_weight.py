"""Packed int8 and int4 weights as rows of floating-point numbers, for products of many rows."""

from __future__ import annotations

import triton
import triton.language as tl

from petalsd.kernels.weight_values import unpack_bytes, unpack_nibbles


@triton.jit(do_not_specialize=["first_tile"])
def unpack_weight_kernel(
    words, scales, out, first_tile, num_groups, out_stride,
    BITS: tl.constexpr, GROUPS: tl.constexpr, IN_PTX: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of 16 outputs, ceil(num_groups / GROUPS)).

    words   int32 ``[tiles, words, 16]``
    scales  int8: float32 ``[16 * tiles]``; int4: bits of bfloat16, int16 ``[tiles, num_groups, 16]``
    out     ``[16 * grid[0], 64 * num_groups]``: tiles from ``first_tile``, times their scales, rounded once
    """
    GROUP_INPUTS: tl.constexpr = 64
    GROUP_WORDS: tl.constexpr = GROUP_INPUTS * BITS // 32
    WORDS: tl.constexpr = GROUPS * GROUP_WORDS
    INPUTS: tl.constexpr = GROUPS * GROUP_INPUTS
    tile = (first_tile + tl.program_id(0)).to(tl.int64)
    lane = tl.arange(0, 16)
    num_words = num_groups * GROUP_WORDS
    w = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    packed = tl.load(
        words + ((tile * num_words + w) * 16)[:, None] + lane[None, :], mask=(w < num_words)[:, None], other=0
    )
    packed = tl.trans(packed)
    dtype: tl.constexpr = out.dtype.element_ty
    if BITS == 8:
        values = unpack_bytes(packed, dtype, IN_PTX).to(tl.float32)
        values *= tl.load(scales + tile * 16 + lane)[:, None]
    else:
        lower, upper = unpack_nibbles(packed, dtype, IN_PTX)
        halves = tl.join(tl.reshape(lower, (16, WORDS, 4)), tl.reshape(upper, (16, WORDS, 4)))
        values = tl.reshape(tl.permute(halves, (0, 1, 3, 2)), (16, INPUTS)).to(tl.float32)
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        bits = tl.load(
            scales + ((tile * num_groups + group) * 16)[None, :] + lane[:, None],
            mask=(group < num_groups)[None, :], other=0,
        )  # fmt: skip
        scale = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        values = tl.reshape(tl.reshape(values, (16, GROUPS, GROUP_INPUTS)) * scale[:, :, None], (16, INPUTS))
    k = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    row = (tl.program_id(0) * 16 + lane).to(tl.int64)
    places = out + row[:, None] * out_stride + k[None, :]
    tl.store(places, values.to(dtype), mask=(k < num_groups * GROUP_INPUTS)[None, :])
