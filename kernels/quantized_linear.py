"""Products of activations with packed int8 and int4 weights, made whole numbers in the registers of matrix units.

Words of the packed layout hold consecutive inputs, as matrix instructions want them of a thread: where these take
weights from registers, the words are unpacked in the very thread that multiplies with them.
"""

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
    """``[W, N]`` each, a quarter of the rows: ``[4 * W, N]`` with rows w of all four behind each other."""
    quarters = tl.reshape(
        tl.join(tl.join(first, third), tl.join(second, fourth)), (first.shape[0], first.shape[1], 4)
    )
    return tl.reshape(tl.permute(quarters, (0, 2, 1)), (4 * first.shape[0], first.shape[1]))


@triton.jit
def _spread(words, FIRST: tl.constexpr, MASK: tl.constexpr):
    """The fields of words ``[W, N]`` that start at bits FIRST, FIRST + 8, ...: ``[4 * W, N]``, in order."""
    return _in_order(
        (words >> FIRST) & MASK, (words >> (FIRST + 8)) & MASK, (words >> (FIRST + 16)) & MASK,
        (words >> (FIRST + 24)) & MASK,
    )  # fmt: skip


@triton.jit
def _values_of_pairs(first, second, dtype: tl.constexpr):
    """Values 0 and 1, and 2 and 3, of each word, as pairs in int32 ``[W, N]``: ``[4 * W, N]``, in order."""
    return _in_order(
        first.to(tl.int16).to(dtype, bitcast=True), (first >> 16).to(tl.int16).to(dtype, bitcast=True),
        second.to(tl.int16).to(dtype, bitcast=True), (second >> 16).to(tl.int16).to(dtype, bitcast=True),
    )  # fmt: skip


@triton.jit
def unpack_bytes(words, dtype: tl.constexpr, IN_PTX: tl.constexpr):
    """int8 weights of words ``[W, N]``, not scaled: ``[4 * W, N]``, in order."""
    if IN_PTX and dtype != tl.float32:
        code: tl.constexpr = _BFLOAT16_BYTES if dtype == tl.bfloat16 else _FLOAT16_BYTES
        first, second = tl.inline_asm_elementwise(
            code, "=&r,=&r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
        return _values_of_pairs(first, second, dtype)
    return (_spread(words, 0, 255) - 128).to(dtype)


@triton.jit
def unpack_nibbles(words, dtype: tl.constexpr, IN_PTX: tl.constexpr):
    """int4 weights of words ``[W, N]``, not scaled: those in the lower halves of bytes, then those in the upper
    halves, ``[4 * W, N]`` each: inputs 0 to 3, and 4 to 7, of each word.
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


@triton.jit
def _to_lanes(tile):
    """Reorder the last dimension, of ``[R, N]``: of each 32 outputs those 4 apart come to lie side by side.

    Where a matrix instruction gives a thread outputs 8 apart, the thread then has 4 that are neighbours in memory,
    which it loads as 16 bytes.
    """
    apart = tl.permute(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 32, 8, 4)), (0, 1, 3, 2))
    return tl.reshape(apart, (tile.shape[0], tile.shape[1]))


@triton.jit
def _from_lanes(tile):
    """The inverse of ``_to_lanes``."""
    apart = tl.permute(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 32, 4, 8)), (0, 1, 3, 2))
    return tl.reshape(apart, (tile.shape[0], tile.shape[1]))


@triton.jit
def _load(places, mask, IS_WHOLE: tl.constexpr):
    """Zeros outside the mask; with IS_WHOLE nothing is outside, and the mask is not even computed."""
    if IS_WHOLE:
        return tl.load(places)
    return tl.load(places, mask=mask, other=0)


@triton.jit
def _reduce_splits(total, is_row, partials, arrivals, program, num_programs, NUM_SPLITS: tl.constexpr):
    """Leave this program's sums, and take all of a tile's if it is the last to come. (is last, sums).

    Of the rows that there are. The order of addition does not depend on the order of arrival.
    """
    rows: tl.constexpr = total.shape[0]
    columns: tl.constexpr = total.shape[1]
    inside = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    split = tl.program_id(2)
    tl.store(
        partials + (split * num_programs + program) * rows * columns + inside, total, mask=is_row[:, None]
    )
    tl.debug_barrier()  # all threads have stored before one of them says so
    is_last = tl.atomic_add(arrivals + program, 1, sem="acq_rel") == NUM_SPLITS - 1
    total = tl.zeros([rows, columns], tl.float32)
    if is_last:
        for other in range(NUM_SPLITS):
            place = partials + (other * num_programs + program) * rows * columns + inside
            total += tl.load(place, mask=is_row[:, None], other=0.0, cache_modifier=".cg")
        tl.store(arrivals + program, 0)  # as the next launch expects it
    return is_last, total


@triton.jit(do_not_specialize=["num_rows"])
def quantized_linear_kernel(
    x,
    words,
    scales,
    bias,
    out,
    partials,
    arrivals,
    x_stride,
    out_stride,
    num_rows,
    num_in,
    num_out,
    BITS: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    IS_OUT_WHOLE: tl.constexpr,
    IS_IN_WHOLE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IN_PTX: tl.constexpr,
):
    """Grid (tiles of rows, tiles of outputs, NUM_SPLITS); ``ops.quantized_linear`` has shapes and meaning.

    Programs of one split take every NUM_SPLITS-th piece of IN_BLOCK inputs. Products of whole numbers are summed
    in float32, and scaled afterwards: int8 once, int4 by group. IS_OUT_WHOLE, IS_IN_WHOLE: tiles and pieces are
    full.
    """
    GROUP_INPUTS: tl.constexpr = 64
    WORD_INPUTS: tl.constexpr = 32 // BITS
    # Of int8 scales there is one for all inputs, so that a piece may be multiplied at once.
    PART_INPUTS: tl.constexpr = IN_BLOCK if BITS == 8 else GROUP_INPUTS
    row = tl.program_id(0) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    column = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    is_row, is_column = row < num_rows, column < num_out
    num_groups = (num_in + GROUP_INPUTS - 1) // GROUP_INPUTS
    num_words = num_groups * (GROUP_INPUTS // WORD_INPUTS)
    word = tl.arange(0, PART_INPUTS // WORD_INPUTS)
    columns = words + ((column // 16).to(tl.int64) * num_words * 16 + column % 16)[None, :]
    # int4: first the inputs in the lower halves of bytes, then those 4 behind them
    field = tl.arange(0, PART_INPUTS * BITS // 8)
    inputs = field if BITS == 8 else field // 4 * WORD_INPUTS + field % 4
    # Rows beyond the last are computed as that one is, and never stored: so no load needs a mask for them.
    x_rows = x + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * x_stride
    # The scales of a group, bfloat16, as the pairs that they are in: smaller pieces cannot be loaded ahead. In the
    # order of ``_to_lanes``, and each pair twice: what is made of it is then no other shape, and needs no barrier.
    lane = tl.arange(0, OUT_BLOCK)
    scaled = tl.program_id(1) * OUT_BLOCK + lane // 32 * 32 + lane % 8 * 4 + lane % 32 // 8
    pairs = scales + (scaled // 16).to(tl.int64) * num_groups * 8 + scaled % 16 // 2
    is_second = scaled % 2 == 1
    total = tl.zeros([ROWS_BLOCK, OUT_BLOCK], tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    IS_WHOLE: tl.constexpr = IS_OUT_WHOLE and IS_IN_WHOLE
    for piece in tl.range(tl.program_id(2) * IN_BLOCK, num_in, NUM_SPLITS * IN_BLOCK, num_stages=NUM_STAGES):
        for part in tl.static_range(IN_BLOCK // PART_INPUTS):
            start = piece + part * PART_INPUTS
            w = start // WORD_INPUTS + word
            is_weight = (w < num_words)[:, None] & is_column[None, :]
            packed = _to_lanes(_load(columns + (w * 16)[:, None], is_weight, IS_WHOLE))
            k = (start + inputs)[None, :]
            values = _load(x_rows + k, k < num_in, IS_IN_WHOLE)
            if BITS == 8:
                total = tl.dot(values, unpack_bytes(packed, dtype, IN_PTX), total, input_precision="ieee")
            else:
                k += 4
                others = _load(x_rows + k, k < num_in, IS_IN_WHOLE)
                lower, upper = unpack_nibbles(packed, dtype, IN_PTX)
                product = tl.dot(values, lower, input_precision="ieee")
                product = tl.dot(others, upper, product, input_precision="ieee")
                is_scale = (scaled < num_out) & (start < num_in)
                bits = _load(pairs + start // GROUP_INPUTS * 8, is_scale, IS_WHOLE)
                scale = tl.where(is_second, bits & -65536, bits << 16).to(tl.float32, bitcast=True)
                total += product * scale[None, :]
    total = _from_lanes(total)
    is_last = True
    if NUM_SPLITS > 1:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        num_programs = tl.num_programs(0) * tl.num_programs(1)
        is_last, total = _reduce_splits(total, is_row, partials, arrivals, program, num_programs, NUM_SPLITS)
    if is_last:
        if BITS == 8:
            total *= tl.load(scales + column, mask=is_column, other=0.0)[None, :]
        if bias is not None:
            total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        places = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
        tl.store(places, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
