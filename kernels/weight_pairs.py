"""Packed weights as the matrix instructions of warp groups take them from registers: as pairs of neighbours.

Of 8 neighbouring inputs each of four threads multiplies two. So a thread reads all words of its outputs and takes
its pair of each: inputs stay in the order that they have in memory, and unpacked weights need no shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The bytes of a pair become 16-bit numbers whose other byte is an exponent, as in `weight_values`.
_NIBBLE_PAIR = """{{
    .reg .b32 exponent, one, offset, nothing;
    mov.b32 exponent, {exponent};
    mov.b32 one, {one};
    mov.b32 offset, {offset};
    mov.b32 nothing, 0x80008000;
    shr.u32 $0, $1, $2;
    and.b32 $0, $0, 0x0f0f0f0f;
    prmt.b32 $0, $0, exponent, 0x4140;
    fma.rn.{type} $0, $0, one, offset;
    fma.rn.{type} $0, $0, $3, nothing;
}}"""
_BFLOAT16_NIBBLE_PAIR = tl.constexpr(
    _NIBBLE_PAIR.format(type="bf16x2", exponent="0x43434343", one="0x3f803f80", offset="0xc308c308")
)
_FLOAT16_NIBBLE_PAIR = tl.constexpr(
    _NIBBLE_PAIR.format(type="f16x2", exponent="0x64646464", one="0x3c003c00", offset="0xe408e408")
)
_BFLOAT16_BYTE_PAIR = tl.constexpr("""{
    .reg .b32 zero, minus_one, offset;
    mov.b32 zero, 0;
    mov.b32 minus_one, 0xbf80bf80;
    shr.u32 $0, $1, $2;
    prmt.b32 $0, $0, zero, 0x4140;
    lop3.b32 offset, $0, 0x00800080, 0x43004300, 0xae;
    lop3.b32 $0, $0, 0x007f007f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, offset, minus_one, $0;
}""")
_FLOAT16_BYTE_PAIR = tl.constexpr("""{
    .reg .b32 exponent, one, offset;
    mov.b32 exponent, 0x64646464;
    mov.b32 one, 0x3c003c00;
    mov.b32 offset, 0xe480e480;
    shr.u32 $0, $1, $2;
    prmt.b32 $0, $0, exponent, 0x4140;
    fma.rn.f16x2 $0, $0, one, offset;
}""")


@triton.jit
def _in_order(first, second):
    """Firsts and seconds of pairs, ``[N, W, P]`` each: ``[N, 2 * P * W]``."""
    return tl.reshape(tl.join(first, second), (first.shape[0], 2 * first.shape[1] * first.shape[2]))


@triton.jit
def _of_pairs(pairs, dtype: tl.constexpr):
    """Pairs of 16-bit numbers in int32 ``[N, W, P]``: ``[N, 2 * P * W]``."""
    first = pairs.to(tl.int16).to(dtype, bitcast=True)
    return _in_order(first, (pairs >> 16).to(tl.int16).to(dtype, bitcast=True))


@triton.jit
def unpack_byte_pairs(words, dtype: tl.constexpr, IN_PTX: tl.constexpr):
    """int8 weights of words ``[N, W]``, not scaled: ``[N, 4 * W]``."""
    shifts = (tl.arange(0, 2) * 16)[None, None, :]
    words = words[:, :, None]
    if IN_PTX:
        code: tl.constexpr = _BFLOAT16_BYTE_PAIR if dtype == tl.bfloat16 else _FLOAT16_BYTE_PAIR
        pairs = tl.inline_asm_elementwise(
            code, "=&r,r,r", [words, shifts], dtype=tl.int32, is_pure=True, pack=1
        )
        return _of_pairs(pairs, dtype)
    return _in_order(
        (((words >> shifts) & 255) - 128).to(dtype), (((words >> (shifts + 8)) & 255) - 128).to(dtype)
    )


@triton.jit
def unpack_scaled_nibble_pairs(words, scales, dtype: tl.constexpr, IN_PTX: tl.constexpr):
    """int4 weights of words ``[N, W]`` times their outputs' scales, float32 ``[N]``, rounded: ``[N, 8 * W]``.

    Inputs 0 to 3 of a word are in the lower halves of its bytes, 4 to 7 in the upper ones.
    """
    pair = tl.arange(0, 4)
    shifts = (pair % 2 * 16 + pair // 2 * 4)[None, None, :]
    words = words[:, :, None]
    scale = scales.to(dtype)
    if IN_PTX:
        code: tl.constexpr = _BFLOAT16_NIBBLE_PAIR if dtype == tl.bfloat16 else _FLOAT16_NIBBLE_PAIR
        bits = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        twice = (bits | (bits << 16))[:, None, None]
        pairs = tl.inline_asm_elementwise(
            code, "=&r,r,r,r", [words, shifts, twice], dtype=tl.int32, is_pure=True, pack=1
        )
        return _of_pairs(pairs, dtype)
    factors = scale[:, None, None]
    return _in_order(
        (((words >> shifts) & 15) - 8).to(dtype) * factors,
        (((words >> (shifts + 8)) & 15) - 8).to(dtype) * factors,
    )
