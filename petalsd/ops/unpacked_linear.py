"""Products of many rows with int8 and int4 weights on a GPU: the weight is unpacked part by part, and multiplied.

A dense product is limited by arithmetic from some hundred rows on. Then it is torch's that comes near to the
limit, and what it costs to unpack the weight is divided by all rows.
"""

from __future__ import annotations

import torch

from petalsd.kernels.unpack_weight import unpack_weight_kernel
from petalsd.ops.launching import Options, launch, takes_ptx
from petalsd.ops.packed_weight import TILE_OUTPUTS, PackedWeight, WeightFormat

# Of the unpacked weight at once: enough outputs for a product that fills the device, little beside the weights.
PART_BYTES = 64 << 20
_GROUPS = 4


def unpacked_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """``out = x @ weight.T + bias`` as ``ops.quantized_linear``, which has checked them.

    Weights are rounded to the dtype of x.
    """
    layout = weight.layout
    room: torch.Tensor | None = None
    for tiles in weight.tile_chunks(PART_BYTES // x.itemsize):
        first, end = tiles.start * TILE_OUTPUTS, min(tiles.stop * TILE_OUTPUTS, weight.num_out)
        if room is None:  # the first is the largest
            room = x.new_empty((tiles.stop - tiles.start) * TILE_OUTPUTS, layout.padded_in)
        unpack_rows(weight, tiles, room)
        part, columns = room[: end - first, : weight.num_in].t(), out[:, first:end]
        if bias is None:
            torch.mm(x, part, out=columns)
        else:
            torch.addmm(bias[first:end], x, part, out=columns)


def unpack_rows(weight: PackedWeight, tiles: slice, out: torch.Tensor) -> None:
    """The outputs of these tiles, times their scales, into the first rows of ``out`` ``[R, padded_in]``."""
    assert weight.scales is not None
    bits, num_groups = 8 if weight.format is WeightFormat.INT8 else 4, weight.layout.num_groups
    scales = weight.scales if bits == 8 else weight.scales.view(torch.int16)
    launch(
        unpack_weight_kernel,
        (tiles.stop - tiles.start, -(-num_groups // _GROUPS)),
        (weight.words, scales, out, tiles.start, num_groups, out.stride(0)),
        {"BITS": bits, "GROUPS": _GROUPS, "IN_PTX": takes_ptx(unpack_weight_kernel)},
        Options(num_warps=4, num_stages=1),
    )
