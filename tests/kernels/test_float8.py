"""float8 in kernels: rounding by its bits is torch's, and every number that is read is what was written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from petalsd.kernels.float8 import to_float8
from petalsd.ops.eight_bit_kv import FLOAT8

NUM_RANDOM = 1 << 16


@triton.jit
def _rounding_kernel(x, out, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(out + places, to_float8(tl.load(x + places)))


@triton.jit
def _reading_kernel(codes, out, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(out + places, tl.load(codes + places).to(out.dtype.element_ty))


def all_numbers() -> torch.Tensor:
    """The format's 254 numbers, ascending, with both zeros; float32."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    return numbers[numbers.isfinite()].sort().values


def test_rounding_is_that_of_torch() -> None:
    """Any bits, numbers of the format, what lies half way between two of them and next to that, and the ends.

    The interpreter's own conversion does not carry into the exponent and knows no NaN, so kernels go without it.
    """
    random = torch.randint(-(2**31), 2**31, (NUM_RANDOM,)).int().view(torch.float32)
    numbers, infinity = all_numbers(), torch.tensor(torch.inf)
    ties = (numbers[1:] + numbers[:-1]) / 2
    ends = torch.tensor([448.0, 464.0, 464.1, 480.0, 1e30, torch.inf, 2**-10, 2**-11, 1e-40, 0.0])
    x = torch.cat(
        [random, numbers, ties, ties.nextafter(infinity), ties.nextafter(-infinity), ends, -ends, ends - ends]
    )
    x = torch.cat([x, torch.zeros(triton.next_power_of_2(len(x)) - len(x))])
    found = torch.empty(len(x), dtype=FLOAT8)
    _rounding_kernel[(1,)](x, found, N=len(x))
    expected, is_nan = x.clamp(-448, 448).to(FLOAT8), x.isnan()
    assert torch.equal(found.view(torch.uint8)[~is_nan], expected.view(torch.uint8)[~is_nan])
    assert is_nan.any() and found.float()[is_nan].isnan().all()


def test_every_number_is_read_exactly() -> None:
    """In float32 and in float16, which hold them all."""
    numbers = torch.cat([all_numbers(), torch.zeros(2)])
    for dtype in (torch.float32, torch.float16):
        out = torch.empty(256, dtype=dtype)
        _reading_kernel[(1,)](numbers.to(FLOAT8), out, N=256)
        assert torch.equal(out.float(), numbers)
