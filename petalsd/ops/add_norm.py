"""Residual addition and normalization in one launch: root mean square, Gemma's, and LayerNorm."""

from __future__ import annotations

import torch
from torch.nn import functional

from petalsd.kernels.add_norm import add_norm_kernel
from petalsd.ops.launching import Options, check_tensor, launch, next_power_of_2, strides
from petalsd.ops.norm import Norm

_VALUES_PER_WARP = 512
_MAX_WARPS = 16


def add_norm(x: torch.Tensor | None, residual: torch.Tensor, norm: Norm, out: torch.Tensor) -> None:
    """``residual += x``, and ``out = (offset + weight) * residual / sqrt(mean(residual^2) + eps) + bias``.

    x         ``[T, M]``; None: the residual stays as it is
    residual  ``[T, M]``, in place; the sum is rounded to its dtype before it is normalized, as in transformers
    out       ``[T, M]``

    Statistics are float32. ValueError for tensors that don't fit.
    """
    rows, width = residual.shape
    check_tensor("residual", residual, (None, None))
    check_tensor("out", out, (rows, width))
    check_tensor("weight", norm.weight, (width,))
    if x is not None:
        check_tensor("x", x, (rows, width))
    if norm.bias is not None:
        check_tensor("bias", norm.bias, (width,))
    block = next_power_of_2(width)
    launch(
        add_norm_kernel,
        (rows,),
        (
            x, residual, norm.weight, norm.bias, out,
            strides(residual if x is None else x)[0], strides(residual)[0], strides(out)[0], norm.eps,
        ),
        {"WIDTH": width, "BLOCK": block, "OFFSET": norm.offset, "IS_LAYER_NORM": norm.is_layer_norm},
        Options(num_warps=min(_MAX_WARPS, max(1, block // _VALUES_PER_WARP)), num_stages=1),
    )  # fmt: skip


def reference_add_norm(
    x: torch.Tensor | None, residual: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new residual and the normalized rows, in plain torch; both ``[T, M]`` in residual's dtype."""
    total = residual if x is None else (residual.float() + x.float()).to(residual.dtype)
    weight, bias = norm.weight.float() + norm.offset, None if norm.bias is None else norm.bias.float()
    if norm.is_layer_norm:
        normed = functional.layer_norm(total.float(), total.shape[-1:], weight, bias, norm.eps)
    else:
        normed = functional.rms_norm(total.float(), total.shape[-1:], None, norm.eps)
        if norm.offset == 0:
            normed = normed.to(total.dtype).float()
        normed = normed * weight + (0 if bias is None else bias)
    return total, normed.to(total.dtype)
