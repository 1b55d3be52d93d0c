"""Words of packed int8 and int4 weights as floating-point numbers: in PTX where kernels are compiled for it."""

from __future__ import annotations

import triton
import triton.language as tl

# Words to pairs of values, in PTX. The fields of a word become bytes of 16-bit numbers whose other byte is an
# exponent, at which a step is 1: 128 in bfloat16, 1024 in float16. What is too much is then subtracted, exactly.
_NIBBLES = """{{
    .reg .b32 low, high, exponent, one, offset;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    mov.b32 exponent, {exponent};
    mov.b32 one, {one};
    mov.b32 offset, {offset};
    prmt.b32 $0, low, exponent, 0x4140;
    prmt.b32 $1, low, exponent, 0x4342;
    prmt.b32 $2, high, exponent, 0x4140;
    prmt.b32 $3, high, exponent, 0x4342;
    fma.rn.{type} $0, $0, one, offset;
    fma.rn.{type} $1, $1, one, offset;
    fma.rn.{type} $2, $2, one, offset;
    fma.rn.{type} $3, $3, one, offset;
}}"""
_BFLOAT16_NIBBLES = tl.constexpr(
    _NIBBLES.format(type="bf16x2", exponent="0x43434343", one="0x3f803f80", offset="0xc308c308")
)
_FLOAT16_NIBBLES = tl.constexpr(
    _NIBBLES.format(type="f16x2", exponent="0x64646464", one="0x3c003c00", offset="0xe408e408")
)
_FLOAT16_BYTES = tl.constexpr("""{
    .reg .b32 exponent, one, offset;
    mov.b32 exponent, 0x64646464;
    mov.b32 one, 0x3c003c00;
    mov.b32 offset, 0xe480e480;
    prmt.b32 $0, $2, exponent, 0x4140;
    prmt.b32 $1, $2, exponent, 0x4342;
    fma.rn.f16x2 $0, $0, one, offset;
    fma.rn.f16x2 $1, $1, one, offset;
}""")
# A bfloat16 has room for 7 bits: 128 + the lower ones, less 128 or, where the highest is not set, 256.
_BFLOAT16_BYTES = tl.constexpr("""{
    .reg .b32 zero, minus_one, offset;
    mov.b32 zero, 0;
    mov.b32 minus_one, 0xbf80bf80;
    prmt.b32 $0, $2, zero, 0x4140;
    prmt.b32 $1, $2, zero, 0x4342;
    lop3.b32 offset, $0, 0x00800080, 0x43004300, 0xae;
    lop3.b32 $0, $0, 0x007f007f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, offset, minus_one, $0;
    lop3.b32 offset, $1, 0x00800080, 0x43004300, 0xae;
    lop3.b32 $1, $1, 0x007f007f, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, offset, minus_one, $1;
}""")


@triton.jit
def _in_order(first, second, third, fourth):
    """Of each word one value, ``[N, W]`` each: ``[N, 4 * W]`` with the four of a word behind each other."""
    return tl.reshape(
        tl.join(tl.join(first, third), tl.join(second, fourth)), (first.shape[0], 4 * first.shape[1])
    )


@triton.jit
def _spread(words, FIRST: tl.constexpr, MASK: tl.constexpr):
    """The fields of words ``[N, W]`` that start at bits FIRST, FIRST + 8, ...: ``[N, 4 * W]``, in order."""
    return _in_order(
        (words >> FIRST) & MASK, (words >> (FIRST + 8)) & MASK, (words >> (FIRST + 16)) & MASK,
        (words >> (FIRST + 24)) & MASK,
    )  # fmt: skip


@triton.jit
def _values_of_pairs(first, second, dtype: tl.constexpr):
    """Values 0 and 1, and 2 and 3, of each word, as pairs in int32 ``[N, W]``: ``[N, 4 * W]``, in order."""
    return _in_order(
        first.to(tl.int16).to(dtype, bitcast=True), (first >> 16).to(tl.int16).to(dtype, bitcast=True),
        second.to(tl.int16).to(dtype, bitcast=True), (second >> 16).to(tl.int16).to(dtype, bitcast=True),
    )  # fmt: skip


@triton.jit
def unpack_bytes(words, dtype: tl.constexpr, IN_PTX: tl.constexpr):
    """int8 weights of words ``[N, W]``, not scaled: ``[N, 4 * W]``, in order."""
    if IN_PTX and dtype != tl.float32:
        code: tl.constexpr = _BFLOAT16_BYTES if dtype == tl.bfloat16 else _FLOAT16_BYTES
        first, second = tl.inline_asm_elementwise(
            code, "=&r,=&r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
        return _values_of_pairs(first, second, dtype)
    return (_spread(words, 0, 255) - 128).to(dtype)


@triton.jit
def unpack_nibbles(words, dtype: tl.constexpr, IN_PTX: tl.constexpr):
    """int4 weights of words ``[N, W]``, not scaled: those in the lower halves of bytes, then those in the upper
    halves, ``[N, 4 * W]`` each: inputs 0 to 3, and 4 to 7, of each word.
    """
    if IN_PTX and dtype != tl.float32:
        code: tl.constexpr = _BFLOAT16_NIBBLES if dtype == tl.bfloat16 else _FLOAT16_NIBBLES
        first, second, third, fourth = tl.inline_asm_elementwise(
            code,
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        return _values_of_pairs(first, second, dtype), _values_of_pairs(third, fourth, dtype)
    return (_spread(words, 0, 15) - 8).to(dtype), (_spread(words, 4, 15) - 8).to(dtype)
