"""Rows of a layer as the CPU's kernels read and write them."""

from __future__ import annotations

import torch

from petalsd import _C


def layer_rows(rows: torch.Tensor, out: torch.Tensor) -> _C.LayerRows:
    """What comes of ``rows`` ``[..., in]`` is written to ``out`` ``[..., out]``; both outlive the result.

    ValueError unless both are contiguous, of one dtype, and that is float32 or bfloat16.
    """
    is_bfloat16 = rows.dtype == torch.bfloat16
    if rows.dtype != out.dtype or not (is_bfloat16 or rows.dtype == torch.float32):
        raise ValueError(f"rows of {rows.dtype} to {out.dtype}: float32 or bfloat16, both the same")
    if not (rows.is_contiguous() and out.is_contiguous()):
        raise ValueError("rows must be contiguous")
    return _C.LayerRows(rows.data_ptr(), out.data_ptr(), out.numel() // out.shape[-1], is_bfloat16)
