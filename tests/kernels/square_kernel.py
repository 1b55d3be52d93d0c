"""A product of float32 matrices as kernels must not have it, and as they must."""

import triton
import triton.language as tl


@triton.jit
def square_kernel(x, out, PRECISION: tl.constexpr):
    """``out = x @ x``, float32 ``[64, 64]`` each."""
    places = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    values = tl.load(x + places)
    tl.store(out + places, tl.dot(values, values, input_precision=PRECISION))
