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
from petalsd.kernels.weight_pairs import unpack_byte_pairs, unpack_scaled_nibble_pairs
from petalsd.kernels.weight_values import unpack_bytes, unpack_nibbles


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


@triton.jit
def quantized_sums(
    x,
    x_stride,
    row,
    is_row,
    words,
    scales,
    tile,
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
    AS_PAIRS: tl.constexpr,
):
    """This program's part of a tile's products, float32 ``[OUT_BLOCK, ROWS_BLOCK]``; int8 is not scaled yet.

    row, is_row  which rows of x, and which of them there are; ``tile`` is of OUT_BLOCK outputs
    """
    GROUP_INPUTS: tl.constexpr = 64
    TILE_OUTPUTS: tl.constexpr = 16
    WORD_INPUTS: tl.constexpr = 32 // BITS
    # Of int8 scales there is one for all inputs, so that a piece may be multiplied at once.
    PART_INPUTS: tl.constexpr = IN_BLOCK if BITS == 8 else GROUP_INPUTS
    PART_WORDS: tl.constexpr = PART_INPUTS // WORD_INPUTS
    num_groups = (num_in + GROUP_INPUTS - 1) // GROUP_INPUTS
    num_words = num_groups * (GROUP_INPUTS // WORD_INPUTS)
    # Words as they lie in memory, one behind the other for each packed tile: any other order costs bandwidth.
    line = tl.arange(0, OUT_BLOCK // TILE_OUTPUTS * PART_WORDS)
    packed_tile, word = tile * (OUT_BLOCK // TILE_OUTPUTS) + line // PART_WORDS, line % PART_WORDS
    is_tile = packed_tile * TILE_OUTPUTS < num_out
    lines = words + ((packed_tile.to(tl.int64) * num_words + word) * TILE_OUTPUTS)[:, None]
    lines += tl.arange(0, TILE_OUTPUTS)[None, :]
    # int4, but as pairs: first the inputs in the lower halves of bytes, then those 4 behind them
    IS_HALVED: tl.constexpr = BITS == 4 and not AS_PAIRS
    field = tl.arange(0, PART_INPUTS // 2 if IS_HALVED else PART_INPUTS)
    inputs = field // 4 * WORD_INPUTS + field % 4 if IS_HALVED else field
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    # The scales of a group, bfloat16, as the pairs that they are in: smaller pieces cannot be loaded ahead. Each
    # pair twice: what is made of it is then no other shape, and needs no barrier.
    scaled = tile * OUT_BLOCK + _output_at(tl.arange(0, OUT_BLOCK), OUT_BLOCK)
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
                if AS_PAIRS:
                    weights = unpack_byte_pairs(packed, dtype, IN_PTX)
                else:
                    weights = unpack_bytes(packed, dtype, IN_PTX)
                total = tl.dot(weights, tl.trans(values), total, input_precision="ieee")
            else:
                is_scale = (scaled < num_out) & (start < num_in)
                bits = _load(pairs + start // GROUP_INPUTS * 8, is_scale, IS_WHOLE)
                scale = tl.where(is_second, bits & -65536, bits << 16).to(tl.float32, bitcast=True)
                if AS_PAIRS:
                    weights = unpack_scaled_nibble_pairs(packed, scale, dtype, IN_PTX)
                    total = tl.dot(weights, tl.trans(values), total, input_precision="ieee")
                else:
                    k += 4
                    others = _load_rows(x_rows + k, is_row, k < num_in, IS_IN_WHOLE)
                    lower, upper = unpack_nibbles(packed, dtype, IN_PTX)
                    product = tl.dot(lower, tl.trans(values), input_precision="ieee")
                    product = tl.dot(upper, tl.trans(others), product, input_precision="ieee")
                    total += product * scale[:, None]
    return _from_places(total)


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
    AS_PAIRS: tl.constexpr,
):
    """Grid (tiles of rows, tiles of outputs, NUM_SPLITS); ``ops.quantized_linear`` has shapes and meaning.

    With matrix units OUT_BLOCK is 32 for each warp. Programs of one split take neighbouring pieces of IN_BLOCK
    inputs. Products of whole numbers are summed in float32, and scaled afterwards: int8 once, int4 by group.
    IS_OUT_WHOLE, IS_IN_WHOLE: tiles and pieces are full.
    """
    row = tl.program_id(0) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    column = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    is_row, is_column = row < num_rows, column < num_out
    total = quantized_sums(
        x, x_stride, row, is_row, words, scales, tl.program_id(1), num_in, num_out, BITS, ROWS_BLOCK, OUT_BLOCK,
        IN_BLOCK, IS_OUT_WHOLE, IS_IN_WHOLE, NUM_SPLITS, NUM_STAGES, IN_PTX, AS_PAIRS,
    )  # fmt: skip
    is_last = True
    if NUM_SPLITS > 1:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        num_programs = tl.num_programs(0) * tl.num_programs(1)
        is_last, total = reduce_splits(total, partials, arrivals, program, num_programs, NUM_SPLITS)
    if is_last:
        if BITS == 8:
            total *= tl.load(scales + column, mask=is_column, other=0.0)[:, None]
        if bias is not None:
            total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[:, None]
        places = out + row.to(tl.int64)[None, :] * out_stride + column[:, None]
        tl.store(places, total.to(out.dtype.element_ty), mask=is_row[None, :] & is_column[:, None])
