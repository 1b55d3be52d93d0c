"""Products with weights of 16 bits on a GPU: of few rows in one launch of our own, of more by torch.

torch's library divides the inputs of a few rows among programs too, and adds up their parts in another launch.
"""

from __future__ import annotations

import torch

from petalsd.kernels.dense_linear import dense_linear_kernel
from petalsd.ops.launching import Options, check_tensor, launch, strides
from petalsd.ops.split_workspace import ProductTile, SplitWorkspace, tile_for

# Measured on an H200: as fast as torch's, and a launch less. Of more rows torch's are faster, in one launch too.
TILES = (
    ProductTile(16, 64, 128, Options(num_warps=4, num_stages=4), programs=2),
    ProductTile(32, 64, 128, Options(num_warps=4, num_stages=4), programs=2),
)
MAX_ROWS = TILES[-1].rows
"""Beyond, and in float32, products are torch's."""


def dense_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: SplitWorkspace,
) -> None:
    """``out = x @ weight.T + bias``; sums are float32, and rounded once.

    x       ``[R, num_in]``
    weight  ``[num_out, num_in]``
    bias    ``[num_out]``
    out     ``[R, num_out]``

    ValueError for tensors that don't fit.
    """
    (rows, num_in), num_out = x.shape, len(weight)
    check_tensor("weight", weight, (None, num_in), x.dtype)
    check_tensor("out", out, (rows, num_out), x.dtype)
    if bias is not None:
        check_tensor("bias", bias, (num_out,))
    if rows > MAX_ROWS or x.dtype == torch.float32:
        _by_torch(x, weight, bias, out)
        return
    check_tensor("x", x, (None, num_in))
    tile = tile_for(rows, TILES)
    num_tiles = -(-num_out // tile.outputs)
    num_splits = workspace.num_splits(tile, num_tiles, num_in)
    launch(
        dense_linear_kernel,
        (1, num_tiles, num_splits),
        (
            x, weight, bias, out,
            workspace.partials if num_splits > 1 else None, workspace.arrivals if num_splits > 1 else None,
            strides(x)[0], strides(weight)[0], strides(out)[0], rows, num_in, num_out,
        ),
        {
            "ROWS_BLOCK": tile.rows, "OUT_BLOCK": tile.outputs, "IN_BLOCK": tile.inputs,
            "IS_IN_WHOLE": num_in % tile.inputs == 0, "NUM_SPLITS": num_splits,
            "NUM_STAGES": tile.options.num_stages,
        },
        tile.options,
    )  # fmt: skip


def _by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
