"""What the attention kernels demand of their tensors."""

from __future__ import annotations

import torch

from petalsd.ops.decode_batch import ORIGINS_MULTIPLE
from petalsd.ops.eight_bit_kv import Float8KV, Int8KV, check_float8
from petalsd.ops.launching import Argument, check_tensor
from petalsd.ops.ragged import PagedKV

MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 16


def check_queries(name: str, states: torch.Tensor, kv: PagedKV, like: torch.Tensor) -> None:
    """ValueError unless ``states`` ``[T, H, D]`` is a tensor like ``like``, of queries for these pages.

    A token's heads lie one after the other; tokens may lie apart, by a multiple of 16 elements.
    """
    num_kv_heads, head_dim = kv.k.shape[2:]
    check_tensor(name, states, (like.shape[0], like.shape[1], head_dim), like.dtype)
    if states.shape[1] % num_kv_heads:
        raise ValueError(
            f"{name} has {states.shape[1]} heads: they must be a multiple of {num_kv_heads} KV heads"
        )
    if states.shape[1] > 1 and states.stride(1) != head_dim:
        raise ValueError(
            f"{name} has strides {list(states.stride())}: heads must lie {head_dim} elements apart"
        )


def check_pages(kv: PagedKV, dtype: torch.dtype) -> None:
    """ValueError unless kernels that compute in ``dtype`` can read these pages on their device.

    Slabs are contiguous, so that every key starts at a multiple of 16 elements: with other strides the kernels
    would be compiled without asynchronous copies, and spill.
    """
    head_dim = kv.k.shape[-1]
    if type(kv) not in (PagedKV, Int8KV, Float8KV):
        raise ValueError(f"pages are {type(kv).__name__}: kernels read keys and values token by token")
    if head_dim % _HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"head size = {head_dim}: kernels serve multiples of {_HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
        )
    if kv.k.shape != kv.v.shape or any(not slab.is_contiguous() for slab in kv.slabs):
        raise ValueError("the slabs of keys and values must be contiguous and of one shape")
    computed = kv.dtype if isinstance(kv, Int8KV | Float8KV) else kv.k.dtype
    if computed != dtype:
        raise ValueError(f"pages are for blocks that compute in {computed}, not in {dtype}")
    if isinstance(kv, Float8KV) and kv.k.device.type == "cuda":
        check_float8(kv.k.device)


def check_rows(num_rows: int, context_lens: torch.Tensor, origins: torch.Tensor) -> None:
    """ValueError unless these are int32 tensors of ``num_rows`` rows, as ``ops.decode_batch`` says."""
    check_tensor("context_lens", context_lens, (num_rows,), torch.int32)
    check_tensor("origins", origins, (num_rows, None), torch.int32)
    if origins.stride(0) % ORIGINS_MULTIPLE:
        raise ValueError(
            f"origins have rows {origins.stride(0)} apart: it must be a multiple of {ORIGINS_MULTIPLE}"
        )


def scales_of(kv: PagedKV) -> tuple[Argument, Argument]:
    """The kernels' arguments k_scales and v_scales."""
    return (kv.k_scales, kv.v_scales) if isinstance(kv, Int8KV) else (None, None)
