"""``expert_linear`` over packed int8 and int4 weights, all experts' in one storage."""

from __future__ import annotations

import triton
import triton.language as tl

from petalsd.kernels.expert_order import pairs_of_block
from petalsd.kernels.quantized_linear import quantized_sums
from petalsd.kernels.split_sums import reduce_splits


@triton.jit(do_not_specialize=["pairs_per_row"])
def quantized_expert_linear_kernel(
    x,
    words,
    scales,
    bias,
    out,
    order,
    blocks,
    partials,
    arrivals,
    x_stride,
    out_stride,
    pairs_per_row,
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
    """Grid (blocks of pairs, tiles of outputs, NUM_SPLITS); ``ops.expert_linear`` has shapes and meaning.

    The product is that of ``quantized_linear_kernel``. An expert's outputs fill packed tiles.
    """
    block = blocks + tl.program_id(0) * 4
    expert, start, end = tl.load(block).to(tl.int64), tl.load(block + 1), tl.load(block + 2)
    if start == end:
        return
    pair, is_row = pairs_of_block(order, start, end, ROWS_BLOCK)
    column = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    num_groups = (num_in + 63) // 64
    words += expert * num_out * num_groups * (64 * BITS // 32)
    scales += expert * num_out if BITS == 8 else expert * num_out * num_groups // 2
    total = quantized_sums(
        x, x_stride, pair // pairs_per_row, is_row, words, scales, tl.program_id(1), num_in, num_out, BITS,
        ROWS_BLOCK, OUT_BLOCK, IN_BLOCK, IS_OUT_WHOLE, IS_IN_WHOLE, NUM_SPLITS, NUM_STAGES, IN_PTX, AS_PAIRS,
    )  # fmt: skip
    is_last = True
    if NUM_SPLITS > 1:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        num_programs = tl.num_programs(0) * tl.num_programs(1)
        is_last, total = reduce_splits(total, partials, arrivals, program, num_programs, NUM_SPLITS)
    if is_last:
        is_column = column < num_out
        if BITS == 8:
            total *= tl.load(scales + column, mask=is_column, other=0.0)[:, None]
        if bias is not None:
            added = tl.load(bias + expert * num_out + column, mask=is_column, other=0.0)
            total += added.to(tl.float32)[:, None]
        places = out + pair.to(tl.int64)[None, :] * out_stride + column[:, None]
        tl.store(places, total.to(out.dtype.element_ty), mask=is_row[None, :] & is_column[:, None])
