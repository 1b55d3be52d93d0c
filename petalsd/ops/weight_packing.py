"""Writes row-major weights into packed storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petalsd import _C
from petalsd.ops import memory
from petalsd.ops.packed_weight import PackedWeight, WeightFormat, native_weight
from petalsd.ops.staging import Copy

_NATIVE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def pack_weight(weight: torch.Tensor, format: WeightFormat) -> PackedWeight:
    """A finite ``[num_out, num_in]`` weight of any float dtype, copied into memory of its own."""
    packed = PackedWeight.empty(format, weight.shape[0], weight.shape[1])
    pack_rows([weight], packed)
    return packed


def pack_stack(weights: torch.Tensor, format: WeightFormat, device: torch.device) -> PackedWeight:
    """Finite weights ``[E, num_out, num_in]`` on ``device``, the outputs of each below those of the one before.

    They are packed one by one. ValueError unless ``num_out`` fills tiles.
    """
    num_weights, num_out, num_in = weights.shape
    packed = PackedWeight.empty(
        format, num_weights * num_out, num_in, lambda shape, dtype: memory.empty(shape, dtype, device)
    )
    for number, weight in enumerate(weights):
        pack_rows([weight.cpu()], packed.outputs(number * num_out, (number + 1) * num_out))
    return packed


def pack_rows(parts: Sequence[torch.Tensor], packed: PackedWeight, copy: Copy = torch.Tensor.copy_) -> None:
    """Fill ``packed`` with these finite weights ``[n, num_in]``, one below the other.

    On the CPU they are read where they are, on the calling thread alone (``csrc/weight_storage.hpp``); of a dtype
    that C++ does not know a copy is made. For another device it is packed here first, and then copied by ``copy``.
    ValueError when shapes don't fit.
    """
    if packed.device.type != "cpu":
        here = PackedWeight.empty(packed.format, packed.num_out, packed.num_in)
        pack_rows(parts, here)
        copy(packed.data, here.data)
        if packed.scales is not None and here.scales is not None:
            copy(packed.scales, here.scales)
        return
    num_out = sum(len(part) for part in parts)
    if num_out != packed.num_out or any(part.shape[1:] != (packed.num_in,) for part in parts):
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"weights {shapes} do not make up [{packed.num_out}, {packed.num_in}]")
    readable = [_readable(part) for part in parts]
    rows = [(part.data_ptr(), _NATIVE_DTYPES[part.dtype], part.stride(0), len(part)) for part in readable]
    _C.pack_weight(rows, native_weight(packed), "auto")


def _readable(part: torch.Tensor) -> torch.Tensor:
    """As C++ reads it: on the CPU, each row in one piece."""
    part = part.detach().cpu()
    if part.dtype not in _NATIVE_DTYPES:
        part = part.float()
    return part if part.stride(1) == 1 else part.contiguous()
