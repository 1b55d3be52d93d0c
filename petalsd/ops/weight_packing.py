"""Writes row-major weights into packed storage, a few tiles at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petalsd.ops import memory
from petalsd.ops.packed_weight import TILE_OUTPUTS, PackedWeight, WeightFormat
from petalsd.ops.staging import Copy
from petalsd.ops.weight_rounding import SERIAL_VALUES, round_int4, round_int8


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

    On the CPU there is never more than some hundred KB in memory besides it, or a few times a tile. For another
    device it is packed here first, and then copied by ``copy``. ValueError when shapes don't fit.
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
    padded_in = packed.layout.padded_in
    dtype = torch.bfloat16 if packed.format is WeightFormat.BFLOAT16 else torch.float32
    for tiles in packed.tile_chunks(SERIAL_VALUES):
        first, last = tiles.start * TILE_OUTPUTS, tiles.stop * TILE_OUTPUTS
        rows = torch.zeros(last - first, padded_in, dtype=dtype, device="cpu")
        _gather(parts, first, rows[:, : packed.num_in])
        _pack_tiles(rows, tiles, packed)


def _gather(parts: Sequence[torch.Tensor], first: int, rows: torch.Tensor) -> None:
    """Copy the rows from ``first`` of all parts together into ``rows``, as far as there are any."""
    start = -first
    for part in parts:
        stop = start + len(part)
        low, high = max(0, start), min(len(rows), stop)
        if low < high:
            rows[low:high] = part[low - start : high - start]
        start = stop


def _pack_tiles(rows: torch.Tensor, tiles: slice, packed: PackedWeight) -> None:
    """``rows`` ``[16 * tiles, padded_in]`` in float32, or bfloat16 for that format."""
    if packed.scales is None:
        stored = rows
    elif packed.format is WeightFormat.INT8:
        stored, scales = round_int8(rows)
        packed.scales[tiles.start * TILE_OUTPUTS : tiles.stop * TILE_OUTPUTS] = scales
    else:
        stored, scales = round_int4(rows)
        packed.scales[tiles] = scales.view(-1, TILE_OUTPUTS, scales.shape[1]).transpose(1, 2)
    words = stored.view(torch.int32).view(-1, TILE_OUTPUTS, packed.words.shape[1])
    packed.words[tiles] = words.transpose(1, 2)
