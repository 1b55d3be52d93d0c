"""Products of activations with packed int8 and int4 weights, made whole numbers in the registers of matrix units.

Words of the packed layout hold consecutive inputs, as matrix instructions want them of a thread: where these take
weights from registers, the words are unpacked in the very thread that multiplies with them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _spread(words, FIRST: tl.constexpr, MASK: tl.constexpr):
    """The fields of words ``[W, N]`` that start at bits FIRST, FIRST + 8, ...: ``[4 * W, N]``, in order."""
    even = tl.join((words >> FIRST) & MASK, (words >> (FIRST + 16)) & MASK)
    odd = tl.join((words >> (FIRST + 8)) & MASK, (words >> (FIRST + 24)) & MASK)
    fields = tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1], 4))
    return tl.reshape(tl.permute(fields, (0, 2, 1)), (4 * words.shape[0], words.shape[1]))


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
def _reduce_splits(total, partials, arrivals, program, num_programs, NUM_SPLITS: tl.constexpr):
    """Leave this program's sums, and take all of a tile's if it is the last to come. (is last, sums).

    The order of addition does not depend on the order of arrival.
    """
    rows: tl.constexpr = total.shape[0]
    columns: tl.constexpr = total.shape[1]
    inside = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    split = tl.program_id(2)
    tl.store(partials + (split * num_programs + program) * rows * columns + inside, total)
    tl.debug_barrier()  # all threads have stored before one of them says so
    is_last = tl.atomic_add(arrivals + program, 1, sem="acq_rel") == NUM_SPLITS - 1
    total = tl.zeros([rows, columns], tl.float32)
    if is_last:
        for other in range(NUM_SPLITS):
            place = partials + (other * num_programs + program) * rows * columns + inside
            total += tl.load(place, cache_modifier=".cg")
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
    NUM_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid (tiles of rows, tiles of outputs, NUM_SPLITS); ``ops.quantized_linear`` has shapes and meaning.

    Programs of one split take every NUM_SPLITS-th piece of IN_BLOCK inputs; int4 pieces are a group. Products of
    whole numbers are summed in float32, and scaled afterwards: int8 once, int4 by group.
    """
    GROUP_INPUTS: tl.constexpr = 64
    WORD_INPUTS: tl.constexpr = 32 // BITS
    row = tl.program_id(0) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    column = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    is_row, is_column = row < num_rows, column < num_out
    num_groups = (num_in + GROUP_INPUTS - 1) // GROUP_INPUTS
    num_words = num_groups * (GROUP_INPUTS // WORD_INPUTS)
    word = tl.arange(0, IN_BLOCK // WORD_INPUTS)
    columns = words + ((column // 16).to(tl.int64) * num_words * 16 + column % 16)[None, :]
    # int4: first the inputs in the lower halves of bytes, then those 4 behind them
    field = tl.arange(0, IN_BLOCK * BITS // 8)
    inputs = field if BITS == 8 else field // 4 * WORD_INPUTS + field % 4
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    # The scales of a group, bfloat16, as pairs: smaller pieces cannot be loaded ahead.
    pair = tl.program_id(1) * (OUT_BLOCK // 2) + tl.arange(0, OUT_BLOCK // 2)
    pairs = scales + (pair // 8).to(tl.int64) * num_groups * 8 + pair % 8
    total = tl.zeros([ROWS_BLOCK, OUT_BLOCK], tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    for start in tl.range(tl.program_id(2) * IN_BLOCK, num_in, NUM_SPLITS * IN_BLOCK, num_stages=NUM_STAGES):
        w = start // WORD_INPUTS + word
        is_weight = (w < num_words)[:, None] & is_column[None, :]
        packed = _to_lanes(tl.load(columns + (w * 16)[:, None], mask=is_weight, other=0))
        k = start + inputs
        values = tl.load(x_rows + k[None, :], mask=is_row[:, None] & (k < num_in)[None, :], other=0.0)
        if BITS == 8:
            total = tl.dot(values, (_spread(packed, 0, 255) - 128).to(dtype), total, input_precision="ieee")
        else:
            k += 4
            others = tl.load(x_rows + k[None, :], mask=is_row[:, None] & (k < num_in)[None, :], other=0.0)
            product = tl.dot(values, (_spread(packed, 0, 15) - 8).to(dtype), input_precision="ieee")
            product = tl.dot(others, (_spread(packed, 4, 15) - 8).to(dtype), product, input_precision="ieee")
            bits = tl.load(pairs + start // GROUP_INPUTS * 8, mask=2 * pair < num_out, other=0)
            scale = tl.join(bits << 16, bits & -65536).to(tl.float32, bitcast=True)
            total += product * _to_lanes(tl.reshape(scale, (1, OUT_BLOCK)))
    total = _from_lanes(total)
    is_last = True
    if NUM_SPLITS > 1:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        num_programs = tl.num_programs(0) * tl.num_programs(1)
        is_last, total = _reduce_splits(total, partials, arrivals, program, num_programs, NUM_SPLITS)
    if is_last:
        if BITS == 8:
            total *= tl.load(scales + column, mask=is_column, other=0.0)[None, :]
        if bias is not None:
            total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        places = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
        tl.store(places, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
