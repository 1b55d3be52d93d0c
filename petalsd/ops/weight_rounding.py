"""How weights become small integers: the scales of the int8 and int4 formats, and rounding to them.

No calibration data: what is minimized is the error of the weights themselves. Scales are normal numbers, never
zero, so that neither rounding nor a kernel meets a division by zero or a slow subnormal number.
"""

from __future__ import annotations

import torch

from petalsd.ops.packed_weight import GROUP_INPUTS, INT4_ZERO, INT8_ZERO

_INT8_MAX = 127
_INT4_MIN, _INT4_MAX = -8, 7
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny

# Where a group's largest value comes to lie, in steps of the scale. -8 uses all 16 levels; farther out clips it
# and makes the steps finer for the others; a positive one gives the longer side to values of the other sign.
_LARGEST_LEVELS = (-8.0, -7.5, -8.6, -9.4, -10.4, 7.4, 8.4)


def round_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[R, K]`` to (uint8 ``[R, K]`` with offset 128, float32 scales ``[R]``), largest value at +-127."""
    scales = (weight.abs().amax(dim=1) / _INT8_MAX).clamp_min_(_SMALLEST_SCALE)
    rounded = (weight / scales[:, None]).round_().add_(INT8_ZERO)
    return rounded.to(torch.uint8), scales


def round_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[R, K]`` to (uint8 ``[R, K]`` with offset 8, bfloat16 scales ``[R, K/64]``); K a multiple of 64.

    The values are rounded against the scales as they are stored.
    """
    groups = weight.view(-1, GROUP_INPUTS)
    scales = _int4_scales(groups)
    rounded = (groups / scales[:, None].float()).round_().clamp_(_INT4_MIN, _INT4_MAX).add_(INT4_ZERO)
    return rounded.to(torch.uint8).view(weight.shape), scales.view(len(weight), -1)


def _int4_scales(groups: torch.Tensor) -> torch.Tensor:
    """bfloat16 ``[n]`` for float32 ``[n, 64]``: of several ways to place the largest value the one of least error.

    For levels l of the values x the scale of least squared error is (x.l)/(l.l), its error x.x - (x.l)^2/(l.l).
    """
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    largest = torch.where(largest.abs() < _SMALLEST_SCALE, _SMALLEST_SCALE, largest)
    relative = groups / largest
    best_gain = relative.new_full((len(groups),), -1.0)
    best_scale = torch.zeros_like(best_gain)
    levels, product = torch.empty_like(relative), torch.empty_like(relative)
    for level in _LARGEST_LEVELS:
        torch.mul(relative, level, out=levels).round_().clamp_(_INT4_MIN, _INT4_MAX)
        fit = torch.mul(relative, levels, out=product).sum(dim=1)
        norm = torch.mul(levels, levels, out=product).sum(dim=1).clamp_min_(1)  # 0 where all values are
        scale = fit / norm
        gain = fit.mul_(scale)
        is_better = gain > best_gain
        best_gain = torch.where(is_better, gain, best_gain)
        best_scale = torch.where(is_better, scale, best_scale)
    scales = largest[:, 0] * best_scale
    return torch.where(scales.abs() < _SMALLEST_SCALE, _SMALLEST_SCALE, scales).bfloat16()
