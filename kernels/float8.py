"""Rounding to float8: e4m3, a sign, 4 bits of exponent and 3 of fraction, without infinities."""

import triton
import triton.language as tl


@triton.jit
def to_float8(x):
    """float32 to the nearest float8e4nv, ties to even; what lies beyond its range becomes its greatest value, 448.

    By the bits, which is the same everywhere: Triton's interpreter rounds wrongly to this format.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 3 of 23 bits of fraction stay, and exponents count from 7 below 0 instead of 127.
    half = 0x7FFFF + ((magnitude >> 20) & 1)
    normal = (tl.add(magnitude, half, sanitize_overflow=False) >> 20) - (120 << 3)  # that of NaN is not used
    # Below 2^-6 the format counts in steps of 2^-9: adding 1.5 * 2^23 to a few of them leaves a whole number.
    is_small = magnitude < 0x3C800000
    steps = tl.where(is_small, tl.abs(x), 0.0) * 512.0
    small = ((steps + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(is_small, small, tl.minimum(normal, 0x7E))
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)  # NaN
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
