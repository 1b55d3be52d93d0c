"""Rotary position embedding, in the half-split layout of transformers."""

from __future__ import annotations

import torch


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each head of ``x`` by its token's angles; differentiable. Su et al., 2021.

    x         ``[..., T, heads, D]``
    cos, sin  ``[T, D]``, the dtype of x; both halves hold the same angles

    Returns a new tensor: ``x * cos + rotate_half(x) * sin`` where ``rotate_half(x1, x2) = (-x2, x1)``.
    """
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return torch.addcmul(x * cos.unsqueeze(-2), rotated, sin.unsqueeze(-2))
