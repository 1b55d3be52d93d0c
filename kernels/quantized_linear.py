"""Products of activations with packed int8 and int4 weights, made whole numbers in the registers of matrix units.

Words of the packed layout hold consecutive inputs, as matrix instructions want them of a thread: these take the
weights as their first operand, from registers, where words are unpacked in the very thread that multiplies with
them. There a thread has outputs 8 apart. So the outputs of a tile are taken in another order, by place: neighbours
in memory come to the same thread, which loads four words as 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petalsd.kernels.split_sums import reduce_splits, split_range

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


# Place 16 * (warps * i + warp) + 8 * k + lane of a tile, for warps of 32 outputs, has output
# 32 * warp + 4 * lane + 2 * i + k; i and k are 0 or 1, and lane is below 8.
@triton.jit
def _output_at(place, OUT_BLOCK: tl.constexpr):
    """Which output of a tile is at a place."""
    half: tl.constexpr = OUT_BLOCK // 2
    return place % half // 16 * 32 + place % 8 * 4 + place // half * 2 + place // 8 % 2


@triton.jit
def _to_places(words, WORDS: tl.constexpr):
    """``[N / 16 * WORDS, 16]`` as they are in memory, WORDS of each packed tile: ``[N, WORDS]`` by place."""
    warps: tl.constexpr = words.shape[0] // WORDS // 2
    apart = tl.reshape(words, (warps, 2, WORDS, 4, 2, 2))
    return tl.reshape(tl.permute(apart, (4, 0, 5, 1, 3, 2)), (32 * warps, WORDS))


@triton.jit
def _from_places(total):
    """``[N, R]`` by place: by output."""
    warps: tl.constexpr = total.shape[0] // 32
    apart = tl.reshape(total, (2, warps, 2, 8, total.shape[1]))
    return tl.reshape(tl.permute(apart, (1, 3, 0, 2, 4)), (32 * warps, total.shape[1]))


@triton.jit
def _load(places, mask, IS_WHOLE: tl.constexpr):
    """Zeros outside the mask; with IS_WHOLE nothing is outside, and the mask is not even computed."""
    if IS_WHOLE:
        return tl.load(places)
    return tl.load(places, mask=mask, other=0)


@triton.jit
def _load_rows(places, is_row, is_input, IS_WHOLE: tl.constexpr):
    """States ``[R, K]``, zeros outside of both; with IS_WHOLE all inputs are there."""
    if IS_WHOLE:
        return tl.load(places, mask=is_row[:, None], other=0.0)
    return tl.load(places, mask=is_row[:, None] & is_input, other=0.0)


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

    With matrix units OUT_BLOCK is 32 for each warp. Programs of one split take neighbouring pieces of IN_BLOCK
    inputs. Products of whole numbers are summed in float32, and scaled afterwards: int8 once, int4 by group.
    IS_OUT_WHOLE, IS_IN_WHOLE: tiles and pieces are full.
    """
    GROUP_INPUTS: tl.constexpr = 64
    TILE_OUTPUTS: tl.constexpr = 16
    WORD_INPUTS: tl.constexpr = 32 // BITS
    # Of int8 scales there is one for all inputs, so that a piece may be multiplied at once.
    PART_INPUTS: tl.constexpr = IN_BLOCK if BITS == 8 else GROUP_INPUTS
    PART_WORDS: tl.constexpr = PART_INPUTS // WORD_INPUTS
    row = tl.program_id(0) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    column = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    is_row, is_column = row < num_rows, column < num_out
    num_groups = (num_in + GROUP_INPUTS - 1) // GROUP_INPUTS
    num_words = num_groups * (GROUP_INPUTS // WORD_INPUTS)
    # Words as they lie in memory, one behind the other for each packed tile: any other order costs bandwidth.
    line = tl.arange(0, OUT_BLOCK // TILE_OUTPUTS * PART_WORDS)
    tile, word = tl.program_id(1) * (OUT_BLOCK // TILE_OUTPUTS) + line // PART_WORDS, line % PART_WORDS
    is_tile = tile * TILE_OUTPUTS < num_out
    lines = words + ((tile.to(tl.int64) * num_words + word) * TILE_OUTPUTS)[:, None]
    lines += tl.arange(0, TILE_OUTPUTS)[None, :]
    # int4: first the inputs in the lower halves of bytes, then those 4 behind them
    field = tl.arange(0, PART_INPUTS * BITS // 8)
    inputs = field if BITS == 8 else field // 4 * WORD_INPUTS + field % 4
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    # The scales of a group, bfloat16, as the pairs that they are in: smaller pieces cannot be loaded ahead. Each
    # pair twice: what is made of it is then no other shape, and needs no barrier.
    scaled = tl.program_id(1) * OUT_BLOCK + _output_at(tl.arange(0, OUT_BLOCK), OUT_BLOCK)
    pairs = scales + (scaled // 16).to(tl.int64) * num_groups * 8 + scaled % 16 // 2
    is_second = scaled % 2 == 1
    total = tl.zeros([OUT_BLOCK, ROWS_BLOCK], tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    IS_WHOLE: tl.constexpr = IS_OUT_WHOLE and IS_IN_WHOLE
    first_piece, end_piece = split_range((num_in + IN_BLOCK - 1) // IN_BLOCK, NUM_SPLITS)
    for piece in tl.range(first_piece, end_piece, num_stages=NUM_STAGES):
        for part in tl.static_range(IN_BLOCK // PART_INPUTS):
            start = piece * IN_BLOCK + part * PART_INPUTS
            first_word = start // WORD_INPUTS
            is_weight = is_tile & (first_word + word < num_words)
            packed = _load(lines + first_word * TILE_OUTPUTS, is_weight[:, None], IS_WHOLE)
            packed = _to_places(packed, PART_WORDS)
            k = (start + inputs)[None, :]
            values = _load_rows(x_rows + k, is_row, k < num_in, IS_IN_WHOLE)
            if BITS == 8:
                weights = unpack_bytes(packed, dtype, IN_PTX)
                total = tl.dot(weights, tl.trans(values), total, input_precision="ieee")
            else:
                k += 4
                others = _load_rows(x_rows + k, is_row, k < num_in, IS_IN_WHOLE)
                lower, upper = unpack_nibbles(packed, dtype, IN_PTX)
                product = tl.dot(lower, tl.trans(values), input_precision="ieee")
                product = tl.dot(upper, tl.trans(others), product, input_precision="ieee")
                is_scale = (scaled < num_out) & (start < num_in)
                bits = _load(pairs + start // GROUP_INPUTS * 8, is_scale, IS_WHOLE)
                scale = tl.where(is_second, bits & -65536, bits << 16).to(tl.float32, bitcast=True)
                total += product * scale[:, None]
    total = _from_places(total)
    is_last = True
    if NUM_SPLITS > 1:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        num_programs = tl.num_programs(0) * tl.num_programs(1)
        is_last, total = reduce_splits(
            total, is_row[None, :], partials, arrivals, program, num_programs, NUM_SPLITS
        )
    if is_last:
        if BITS == 8:
            total *= tl.load(scales + column, mask=is_column, other=0.0)[:, None]
        if bias is not None:
            total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[:, None]
        places = out + row.to(tl.int64)[None, :] * out_stride + column[:, None]
        tl.store(places, total.to(out.dtype.element_ty), mask=is_row[None, :] & is_column[:, None])
