"""Keys and values in 8 bits, with one scale for each token and KV head."""

from __future__ import annotations

import torch

_INT8_MAX = 127


def quantize_states(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, Hkv, D]`` to int8 and float32 scales ``[T, Hkv]``; what is not finite gets a scale of NaN."""
    states = states.float()
    greatest = states.abs().amax(-1)
    scales = torch.where(greatest.isfinite(), greatest / _INT8_MAX, torch.nan)
    inverse = torch.where(scales > 0, 1 / scales, 0.0).unsqueeze(-1)
    return (states * inverse).nan_to_num_(0.0).round_().to(torch.int8), scales
