"""Products of few tokens with the weights of the experts that a router chose for them, expert by expert."""

from __future__ import annotations

import triton
import triton.language as tl

from petalsd.kernels.expert_order import pairs_of_block
from petalsd.kernels.split_sums import reduce_splits, split_range


@triton.jit(do_not_specialize=["pairs_per_row"])
def expert_linear_kernel(
    x,
    weight,
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
    ROWS_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    IS_IN_WHOLE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid (blocks of pairs, tiles of outputs, NUM_SPLITS); ``ops.expert_linear`` has shapes and meaning.

    Blocks of one expert are neighbours in the grid, so that all but one find its weights cached. The product is
    that of ``dense_linear_kernel``.
    """
    block = blocks + tl.program_id(0) * 4
    expert, start, end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    if start == end:
        return
    pair, is_row = pairs_of_block(order, start, end, ROWS_BLOCK)
    column = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    x_rows = x + (pair // pairs_per_row).to(tl.int64)[:, None] * x_stride
    # Beyond the last output that one is computed again, and never stored: loads of weights need no mask.
    output = expert.to(tl.int64) * num_out + tl.minimum(column, num_out - 1)
    weights = weight + output[:, None] * num_in
    first_piece, end_piece = split_range((num_in + IN_BLOCK - 1) // IN_BLOCK, NUM_SPLITS)
    total = tl.zeros([OUT_BLOCK, ROWS_BLOCK], tl.float32)
    for piece in tl.range(first_piece, end_piece, num_stages=NUM_STAGES):
        k = piece * IN_BLOCK + tl.arange(0, IN_BLOCK)[None, :]
        if IS_IN_WHOLE:
            part = tl.load(weights + k)
            values = tl.load(x_rows + k, mask=is_row[:, None], other=0.0)
        else:
            part = tl.load(weights + k, mask=k < num_in, other=0.0)
            values = tl.load(x_rows + k, mask=is_row[:, None] & (k < num_in), other=0.0)
        total = tl.dot(part, tl.trans(values), total, input_precision="ieee")
    is_last = True
    if NUM_SPLITS > 1:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        num_programs = tl.num_programs(0) * tl.num_programs(1)
        is_last, total = reduce_splits(total, partials, arrivals, program, num_programs, NUM_SPLITS)
    if is_last:
        if bias is not None:
            added = tl.load(bias + expert.to(tl.int64) * num_out + column, mask=column < num_out, other=0.0)
            total += added.to(tl.float32)[:, None]
        places = out + pair.to(tl.int64)[None, :] * out_stride + column[:, None]
        is_place = is_row[None, :] & (column < num_out)[:, None]
        tl.store(places, total.to(out.dtype.element_ty), mask=is_place)
