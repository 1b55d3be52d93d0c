"""Products with int8 and int4 weights on a GPU over the CPU's own storage of them; of few rows in one launch."""

from __future__ import annotations

import torch

from petalsd.kernels.quantized_linear import quantized_linear_kernel
from petalsd.ops.launching import Options, check_tensor, launch, strides, takes_ptx
from petalsd.ops.packed_weight import GROUP_INPUTS, PackedWeight, WeightFormat
from petalsd.ops.split_workspace import ProductTile, SplitWorkspace, tile_for
from petalsd.ops.unpacked_linear import unpacked_linear

BITS = {WeightFormat.INT8: 8, WeightFormat.INT4: 4}
MAX_ROWS = 64
"""Beyond, weights are unpacked for a dense product."""


# All fit the shared memory of their devices, and none spills. Measured on an H100 and an H200.
_FEW_ROWS = (
    ProductTile(8, 64, 128, Options(num_warps=2, num_stages=3), programs=10),
    ProductTile(16, 64, 128, Options(num_warps=2, num_stages=3), programs=6),
)
TILES = {
    4: (
        *_FEW_ROWS,
        ProductTile(32, 128, 64, Options(num_warps=4, num_stages=4), programs=3),
        ProductTile(64, 128, 128, Options(num_warps=4, num_stages=3), programs=2),
    ),
    8: (
        *_FEW_ROWS,
        ProductTile(32, 64, 64, Options(num_warps=2, num_stages=4), programs=4),
        ProductTile(64, 128, 64, Options(num_warps=4, num_stages=4), programs=2),
    ),
}
GROUP_WARPS = 4  # for whose matrix instructions weights are unpacked as pairs
# Multiplied without matrix units, from registers. Larger tiles spill, and on 10.0 Triton rounds them to TF32.
FLOAT32_TILE = ProductTile(16, 32, 32, Options(num_warps=4, num_stages=3), programs=4)


def quantized_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: SplitWorkspace,
) -> None:
    """``out = x @ weight.T + bias``; sums are float32, and rounded once.

    x       ``[R, num_in]``
    weight  int8 or int4, on x's device; int4 is rounded to x's dtype after it was scaled, with over 16 rows
    bias    ``[num_out]``
    out     ``[R, num_out]``

    ValueError for tensors that don't fit, and other formats.
    """
    rows = len(x)
    if weight.format not in BITS or weight.scales is None:
        raise ValueError(f"the weight's format is {weight.format}: it must be int8 or int4")
    check_tensor("x", x, (None, weight.num_in))
    check_tensor("out", out, (rows, weight.num_out))
    if bias is not None:
        check_tensor("bias", bias, (weight.num_out,))
    if rows > MAX_ROWS:
        unpacked_linear(x, weight, bias, out)
        return
    bits = BITS[weight.format]
    tile = FLOAT32_TILE if x.dtype == torch.float32 else tile_for(rows, TILES[bits])
    inputs = tile.inputs if bits == 8 else max(tile.inputs, GROUP_INPUTS)
    grid = (-(-rows // tile.rows), -(-weight.num_out // tile.outputs))
    num_splits = workspace.num_splits(tile, grid[0] * grid[1], weight.num_in)
    launch(
        quantized_linear_kernel,
        (*grid, num_splits),
        (
            x, weight.words, weight.scales if bits == 8 else weight.scales.view(torch.int32), bias, out,
            workspace.partials if num_splits > 1 else None, workspace.arrivals if num_splits > 1 else None,
            strides(x)[0], strides(out)[0], rows, weight.num_in, weight.num_out,
        ),
        {
            "BITS": bits, "ROWS_BLOCK": tile.rows, "OUT_BLOCK": tile.outputs, "IN_BLOCK": inputs,
            "IS_OUT_WHOLE": weight.num_out % tile.outputs == 0, "IS_IN_WHOLE": weight.num_in % inputs == 0,
            "NUM_SPLITS": num_splits, "NUM_STAGES": tile.options.num_stages,
            "IN_PTX": takes_ptx(quantized_linear_kernel),
            "AS_PAIRS": tile.options.num_warps == GROUP_WARPS and x.dtype != torch.float32,
        },
        tile.options,
    )  # fmt: skip


def reference_quantized_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """The product in float32 ``[R, num_out]``, in plain torch over the unpacked weight."""
    product = x.float() @ weight.unpack(torch.float32).t()
    return product if bias is None else product + bias.float()
