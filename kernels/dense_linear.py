"""Products of few rows with weights that are not packed: every weight is read once, and never waits for sums."""

from __future__ import annotations

import triton
import triton.language as tl

from petalsd.kernels.split_sums import reduce_splits, split_range


@triton.jit(do_not_specialize=["num_rows"])
def dense_linear_kernel(
    x,
    weight,
    bias,
    out,
    partials,
    arrivals,
    x_stride,
    weight_stride,
    out_stride,
    num_rows,
    num_in,
    num_out,
    ROWS_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    IS_IN_WHOLE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid (1, tiles of outputs, NUM_SPLITS); ``ops.dense_linear`` has shapes and meaning.

    The weight is the first operand: matrix instructions take at least 16 rows of that one, those of warp groups
    64, but 8 of the other. Programs of one split take neighbouring pieces of IN_BLOCK inputs. IS_IN_WHOLE: all
    pieces are full.
    """
    row = tl.arange(0, ROWS_BLOCK)
    column = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    is_row, is_column = row < num_rows, column < num_out
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    # Beyond the last output that one is computed again, and never stored: loads of weights need no mask.
    weights = weight + tl.minimum(column, num_out - 1).to(tl.int64)[:, None] * weight_stride
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
        total = tl.dot(part, tl.trans(values), total)
    is_last = True
    if NUM_SPLITS > 1:
        is_last, total = reduce_splits(
            total, partials, arrivals, tl.program_id(1), tl.num_programs(1), NUM_SPLITS
        )
    if is_last:
        if bias is not None:
            total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[:, None]
        places = out + row.to(tl.int64)[None, :] * out_stride + column[:, None]
        tl.store(places, total.to(out.dtype.element_ty), mask=is_row[None, :] & is_column[:, None])
