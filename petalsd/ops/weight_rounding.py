"""How weights become small integers: the scales of the int8 and int4 formats, and rounding to them.

No calibration data: what is minimized is the error of the weights themselves. Scales are normal numbers, never
zero, so that neither rounding nor a kernel meets a division by zero or a slow subnormal number.

A model is often loaded while another span is served on the same cores, where threads that wait for each other
between small operations lose all of their time. Everything here is therefore done in pieces so small that torch
computes them on the calling thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petalsd import _C
from petalsd.ops.packed_weight import GROUP_INPUTS, INT8_ZERO

SERIAL_VALUES = 32767  # the most that torch's elementwise operations do not split over threads

_INT8_MAX = 127
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Added to a float32 below 2^22 and taken away again it leaves the nearest whole number; torch.round() would split
# even small tensors over threads.
_ROUNDER = 1.5 * 2**23


def round_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[R, K]`` to (uint8 ``[R, K]`` with offset 128, float32 scales ``[R]``), largest value at +-127."""
    weight = weight.cpu()
    rounded = torch.empty(weight.shape, dtype=torch.uint8, device="cpu")
    scales = torch.empty(len(weight), device="cpu")
    for rows in _pieces(weight):
        scales[rows] = (weight[rows].abs().amax(dim=1) / _INT8_MAX).clamp_min_(_SMALLEST_SCALE)
        rounded[rows] = _round_(weight[rows] / scales[rows, None]).add_(INT8_ZERO)
    return rounded, scales


def round_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[R, K]`` to (uint8 ``[R, K/2]``, bfloat16 scales ``[R, K/64]``); K a multiple of 64.

    Two values share a byte as ``packed_weight`` says. In C++: the search for scales in ``kernels_rounding.inc``
    takes a score of passes over each group, which there stays in registers.
    """
    weight = weight.cpu().contiguous()  # C++ reads it
    num_rows, num_in = weight.shape
    rounded = torch.empty(num_rows, num_in // 2, dtype=torch.uint8, device="cpu")
    scales = torch.empty(num_rows, num_in // GROUP_INPUTS, dtype=torch.bfloat16, device="cpu")
    _C.round_int4(weight.data_ptr(), rounded.data_ptr(), scales.data_ptr(), scales.numel(), "auto")
    return rounded, scales


def _round_(values: torch.Tensor) -> torch.Tensor:
    """To the nearest whole number, ties to the even one, in place."""
    return values.add_(_ROUNDER).sub_(_ROUNDER)


def _pieces(matrix: torch.Tensor) -> Iterator[slice]:
    """Its rows, a few at a time."""
    num_rows = max(1, SERIAL_VALUES // matrix.shape[1])
    for start in range(0, len(matrix), num_rows):
        yield slice(start, start + num_rows)
