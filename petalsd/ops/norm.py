"""Normalization of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over rows of width M.

    weight         ``[M]``
    eps            what is added to the mean square, or to the variance
    offset         what is added to the weight: 1 in Gemma's models
    bias           ``[M]``
    is_layer_norm  the mean is subtracted first
    """

    weight: torch.Tensor
    eps: float
    offset: float = 0.0
    bias: torch.Tensor | None = None
    is_layer_norm: bool = False


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension; Zhang and Sennrich, 2019.

    x       ``[..., D]`` any float dtype; the statistics are taken in float32
    weight  ``[D]``, the dtype of x

    The order of the roundings is transformers' (``LlamaRMSNorm``), so the result is equal to it bit for bit.
    """
    if x.dtype == torch.float32:
        return functional.rms_norm(x, x.shape[-1:], weight, eps)
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
    return weight * (wide * scale).to(x.dtype)
