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

from petalsd.ops.packed_weight import GROUP_INPUTS, INT4_ZERO, INT8_ZERO

SERIAL_VALUES = 32767  # the most that torch's elementwise operations do not split over threads

_INT8_MAX = 127
_INT4_MIN, _INT4_MAX = -8, 7
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Added to a float32 below 2^22 and taken away again it leaves the nearest whole number; torch.round() would split
# even small tensors over threads.
_ROUNDER = 1.5 * 2**23

# Where a group's largest value comes to lie, in steps of the scale. -8 uses all 16 levels; farther out clips it
# and makes the steps finer for the others; a positive one gives the longer side to values of the other sign.
_LARGEST_LEVELS = (-8.0, -7.5, -8.6, -9.4, -10.4, 7.4, 8.4)


def round_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[R, K]`` to (uint8 ``[R, K]`` with offset 128, float32 scales ``[R]``), largest value at +-127."""
    rounded = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(len(weight))
    for rows in _pieces(weight):
        scales[rows] = (weight[rows].abs().amax(dim=1) / _INT8_MAX).clamp_min_(_SMALLEST_SCALE)
        rounded[rows] = _round_(weight[rows] / scales[rows, None]).add_(INT8_ZERO)
    return rounded, scales


def round_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[R, K]`` to (uint8 ``[R, K]`` with offset 8, bfloat16 scales ``[R, K/64]``); K a multiple of 64.

    The values are rounded against the scales as they are stored.
    """
    groups = weight.view(-1, GROUP_INPUTS)
    rounded = torch.empty(groups.shape, dtype=torch.uint8)
    scales = torch.empty(len(groups), dtype=torch.bfloat16)
    for rows in _pieces(groups):
        scales[rows] = _int4_scales(groups[rows])
        levels = _round_(groups[rows] / scales[rows, None].float()).clamp_(_INT4_MIN, _INT4_MAX)
        rounded[rows] = levels.add_(INT4_ZERO)
    return rounded.view(weight.shape), scales.view(len(weight), -1)


def _int4_scales(groups: torch.Tensor) -> torch.Tensor:
    """float32 ``[n]`` for float32 ``[n, 64]``: of several ways to place the largest value the one of least error.

    The squared errors of values x are weighted by |x|: large weights matter more, and the demo model's perplexity
    is a little better for it. For levels l the best scale is then (|x|x.l)/(|x|l.l), and the error the smaller
    the larger (|x|x.l)^2/(|x|l.l) is.
    """
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    largest = torch.where(largest.abs() < _SMALLEST_SCALE, _SMALLEST_SCALE, largest)
    values = groups / largest
    importance = values.abs()
    weighted = values * importance
    best_gain = values.new_full((len(groups),), -1.0)
    best_scale = torch.zeros_like(best_gain)
    levels, product = torch.empty_like(values), torch.empty_like(values)
    for level in _LARGEST_LEVELS:
        _round_(torch.mul(values, level, out=levels)).clamp_(_INT4_MIN, _INT4_MAX)
        fit = torch.mul(weighted, levels, out=product).sum(dim=1)
        norm = torch.mul(levels, levels, out=product).mul_(importance).sum(dim=1).clamp_min_(1)  # 0 for zeros
        scale = fit / norm
        gain = fit.mul_(scale)
        is_better = gain > best_gain
        best_gain = torch.where(is_better, gain, best_gain)
        best_scale = torch.where(is_better, scale, best_scale)
    scales = largest[:, 0] * best_scale
    return torch.where(scales.abs() < _SMALLEST_SCALE, _SMALLEST_SCALE, scales)


def _round_(values: torch.Tensor) -> torch.Tensor:
    """To the nearest whole number, ties to the even one, in place."""
    return values.add_(_ROUNDER).sub_(_ROUNDER)


def _pieces(matrix: torch.Tensor) -> Iterator[slice]:
    """Its rows, a few at a time."""
    num_rows = max(1, SERIAL_VALUES // matrix.shape[1])
    for start in range(0, len(matrix), num_rows):
        yield slice(start, start + num_rows)
