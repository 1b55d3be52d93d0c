"""Weights of 4 bits with a power of two for each 32 of them (OCP MXFP4), as their exact values."""

from __future__ import annotations

import functools

import torch

VALUES_PER_BLOCK = 32
BYTES_PER_BLOCK = VALUES_PER_BLOCK // 2

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BIAS = 127


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values of a weight, bfloat16 ``[num_out, G * 32]``, which holds them exactly.

    blocks  uint8 ``[num_out, G, 16]``, two values in a byte, the first in its lower half
    scales  uint8 ``[num_out, G]``, exponents of two plus 127; with 255, which stands for no number, the result is
            not finite
    """
    pairs, powers = _tables()
    values = pairs.index_select(0, blocks.reshape(-1).int()).view(*scales.shape, VALUES_PER_BLOCK)
    values *= powers.index_select(0, scales.reshape(-1).int()).view(*scales.shape, 1)
    return values.flatten(-2)


@functools.cache
@torch.inference_mode(False)
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Both values of each byte, ``[256, 2]``, and each scale, ``[256]``."""
    nibbles = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], device="cpu")
    bytes_ = torch.arange(256, device="cpu")
    pairs = torch.stack((nibbles[bytes_ & 15], nibbles[bytes_ >> 4]), dim=1).bfloat16()
    powers = torch.exp2((bytes_ - _SCALE_BIAS).double()).bfloat16()
    powers[-1] = torch.nan
    return pairs, powers
