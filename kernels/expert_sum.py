"""What the experts of a token made of it, times the weights that the router gave them, as one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_sum_kernel(
    rows, weights, out, rows_stride, out_stride, WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (tokens, pieces of BLOCK columns). In float32, in the router's order, rounded once."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(TOP_K):
        pair = token * TOP_K + place
        row = tl.load(rows + pair * rows_stride + columns, mask=columns < WIDTH, other=0.0)
        total += row.to(tl.float32) * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * out_stride + columns, total.to(out.dtype.element_ty), mask=columns < WIDTH)
