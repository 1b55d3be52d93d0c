"""Residual addition and normalization of rows, one row per program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    IS_LAYER_NORM: tl.constexpr,
):
    """``residual += x`` unless x is None, then ``out = norm(residual)``; ``ops.add_norm`` has the formulas.

    Everything is computed in float32. The sum is rounded to residual's dtype first: it is what the model goes on
    with.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if x is not None:
        total += tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(residual.dtype.element_ty)
        tl.store(residual + row * residual_stride + columns, rounded, mask=inside)
        total = rounded.to(tl.float32)
    if IS_LAYER_NORM:
        total = tl.where(inside, total - tl.sum(total, 0) / WIDTH, 0.0)
    normed = total * tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
    if OFFSET == 0 and not IS_LAYER_NORM:  # where transformers rounds
        normed = normed.to(out.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if bias is not None:
        normed += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, normed.to(out.dtype.element_ty), mask=inside)
