"""What a kernel over packed weights must compute, in plain torch: the oracle of the kernels' tests."""

from __future__ import annotations

import torch
from torch.nn import functional

from petalsd.ops.packed_weight import GROUP_INPUTS, PackedWeight, WeightFormat

_INT8_MAX = 127


def reference_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + bias`` in float32 ``[R, num_out]`` for x ``[R, num_in]`` and a bias ``[num_out]``.

    float32    products and sums in float32
    bfloat16   the same over activations rounded to bfloat16
    int8 int4  activations are rounded to int8 per row and group of 64 inputs, with the group's largest value at
               127; the products of a group are summed as integers, the groups in float32
    """
    if weight.format.is_quantized:
        product = _integer_product(x.float(), weight)
    else:
        rounded = x.bfloat16() if weight.format is WeightFormat.BFLOAT16 else x
        product = rounded.float() @ weight.unpack(torch.float32).t()
    return product if bias is None else product + bias.float()


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[R, K]`` to whole numbers ``[R, G, 64]`` of -127..127 and float32 scales ``[R, G]``."""
    groups = functional.pad(x, (0, -x.shape[1] % GROUP_INPUTS)).view(len(x), -1, GROUP_INPUTS)
    scales = groups.abs().amax(dim=2) / _INT8_MAX
    divisors = torch.where(scales > 0, scales, 1.0)
    return (groups / divisors[..., None]).round(), scales


def integer_weights(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers ``[N, G, 64]`` (padded) and float32 scales ``[N, G]``, read by the format's definition."""
    assert weight.scales is not None
    num_tiles, num_groups = weight.layout.num_tiles, weight.layout.num_groups
    if weight.format is WeightFormat.INT8:
        whole = (
            weight.data.permute(0, 2, 1, 3).reshape(num_tiles * 16, num_groups, GROUP_INPUTS).float() - 128
        )
        scales = weight.scales[:, None].expand(-1, num_groups)
    else:
        halves = torch.stack((weight.data & 15, weight.data >> 4), dim=-2)  # [tiles, G, 8, 16, 2, 4]
        whole = halves.permute(0, 3, 1, 2, 4, 5).reshape(num_tiles * 16, num_groups, GROUP_INPUTS).float() - 8
        scales = weight.scales.permute(0, 2, 1).reshape(-1, num_groups).float()
    return whole, scales


def least_error_scales(groups: torch.Tensor) -> torch.Tensor:
    """float32 ``[G]`` for float32 ``[G, 64]``: the search of ``kernels_rounding.inc``, every way side by side."""
    smallest = torch.finfo(torch.float32).tiny
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    values = groups / torch.where(largest.abs() < smallest, smallest, largest)
    ways = torch.tensor([-8.0, -7.5, -8.6, -9.4, -10.4, 7.4, 8.4])
    levels = (values * ways[:, None, None]).round().clamp(-8, 7)
    fit = (levels * values * values.abs()).sum(dim=2)
    scales = fit / (levels * levels * values.abs()).sum(dim=2).clamp_min(1)
    best = (fit * scales).argmax(dim=0, keepdim=True)
    chosen = (largest * scales.gather(0, best).t())[:, 0]
    return torch.where(chosen.abs() < smallest, smallest, chosen)


def _integer_product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    activations, act_scales = quantize_activations(x)
    whole, scales = integer_weights(weight)
    product = torch.zeros(len(x), len(whole))
    for group in range(whole.shape[1]):
        sums = activations[:, group] @ whole[:, group].t()  # below 2^24, hence exact
        product += sums * act_scales[:, group, None] * scales[:, group]
    return product[:, : weight.num_out]
