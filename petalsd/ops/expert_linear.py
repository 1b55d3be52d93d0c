"""Products of few tokens with the weights of their experts on a GPU: each product of all experts in one launch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from petalsd.kernels.expert_linear import expert_linear_kernel
from petalsd.kernels.quantized_expert_linear import quantized_expert_linear_kernel
from petalsd.ops import dense_linear, quantized_linear
from petalsd.ops.expert_order import ExpertOrder
from petalsd.ops.launching import check_tensor, launch, strides, takes_ptx
from petalsd.ops.packed_weight import GROUP_INPUTS, TILE_OUTPUTS, PackedWeight
from petalsd.ops.split_workspace import ProductTile, SplitWorkspace

BLOCK_ROWS = (16, 32)
"""Of one expert that are multiplied at once: for up to so many tokens, and for more."""

# As where one weight is for all rows.
_DENSE_TILES = {tile.rows: tile for tile in dense_linear.TILES}
_QUANTIZED_TILES = {
    bits: {tile.rows: tile for tile in tiles} for bits, tiles in quantized_linear.TILES.items()
}
_FLOAT32_TILE = quantized_linear.FLOAT32_TILE


def block_rows(num_tokens: int, dtype: torch.dtype) -> int:
    """How many pairs the blocks of an order for states in ``dtype`` have.

    An expert has at most as many as there are tokens, and in most steps far fewer.
    """
    is_small = num_tokens <= BLOCK_ROWS[0] or dtype == torch.float32
    return BLOCK_ROWS[0] if is_small else BLOCK_ROWS[1]


def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: ExpertOrder,
    out: torch.Tensor,
    workspace: SplitWorkspace,
) -> None:
    """``out[p] = x[p * R // P] @ weight[e].T + bias[e]``, e the expert of pair p; float32 sums, rounded once.

    x       ``[R, num_in]``: a row for each token, or for each of the P pairs
    weight  ``[num_experts, num_out, num_in]``, contiguous
    bias    ``[num_experts, num_out]``, contiguous
    order   of the pairs; its blocks have as many rows as ``block_rows`` says
    out     ``[P, num_out]``

    ValueError for tensors that don't fit.
    """
    check_tensor("weight", weight, (order.num_experts, None, None), x.dtype)
    _, num_out, num_in = weight.shape
    if not weight.is_contiguous():
        raise ValueError(f"weight has strides {list(weight.stride())}: it must be contiguous")
    _check_bias(bias, order, num_out)
    pairs_per_row = _check_rows(x, order, out, num_in, num_out)
    tile = _tile(x, order, _DENSE_TILES)
    grid = (len(order.blocks), -(-num_out // tile.outputs))
    num_splits = workspace.num_splits(tile, grid[0] * grid[1], num_in)
    launch(
        expert_linear_kernel,
        (*grid, num_splits),
        (
            x, weight, bias, out, order.order, order.blocks, *_parts(workspace, num_splits),
            strides(x)[0], strides(out)[0], pairs_per_row, num_in, num_out,
        ),
        {
            "ROWS_BLOCK": tile.rows, "OUT_BLOCK": tile.outputs, "IN_BLOCK": tile.inputs,
            "IS_IN_WHOLE": num_in % tile.inputs == 0, "NUM_SPLITS": num_splits,
            "NUM_STAGES": tile.options.num_stages,
        },
        tile.options,
    )  # fmt: skip


def quantized_expert_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    order: ExpertOrder,
    out: torch.Tensor,
    workspace: SplitWorkspace,
) -> None:
    """``expert_linear`` with the experts' outputs one below the other in an int8 or int4 weight.

    ``quantized_linear`` says how weights are rounded. ValueError for tensors that don't fit, other formats, and
    experts whose outputs fill no packed tiles.
    """
    if weight.format not in quantized_linear.BITS or weight.scales is None:
        raise ValueError(f"the weight's format is {weight.format}: it must be int8 or int4")
    num_in, num_out = weight.num_in, weight.num_out // order.num_experts
    if weight.num_out != order.num_experts * num_out or num_out % TILE_OUTPUTS:
        raise ValueError(
            f"the weight has {weight.num_out} outputs: each of {order.num_experts} experts must have the same "
            f"multiple of {TILE_OUTPUTS}"
        )
    _check_bias(bias, order, num_out)
    pairs_per_row = _check_rows(x, order, out, num_in, num_out)
    bits = quantized_linear.BITS[weight.format]
    tile = _tile(x, order, _QUANTIZED_TILES[bits])
    inputs = tile.inputs if bits == 8 else max(tile.inputs, GROUP_INPUTS)
    grid = (len(order.blocks), -(-num_out // tile.outputs))
    num_splits = workspace.num_splits(tile, grid[0] * grid[1], num_in)
    launch(
        quantized_expert_linear_kernel,
        (*grid, num_splits),
        (
            x, weight.words, weight.scales if bits == 8 else weight.scales.view(torch.int32), bias, out,
            order.order, order.blocks, *_parts(workspace, num_splits),
            strides(x)[0], strides(out)[0], pairs_per_row, num_in, num_out,
        ),
        {
            "BITS": bits, "ROWS_BLOCK": tile.rows, "OUT_BLOCK": tile.outputs, "IN_BLOCK": inputs,
            "IS_OUT_WHOLE": num_out % tile.outputs == 0, "IS_IN_WHOLE": num_in % inputs == 0,
            "NUM_SPLITS": num_splits, "NUM_STAGES": tile.options.num_stages,
            "IN_PTX": takes_ptx(quantized_expert_linear_kernel),
            "AS_PAIRS": tile.options.num_warps == quantized_linear.GROUP_WARPS and x.dtype != torch.float32,
        },
        tile.options,
    )  # fmt: skip


def reference_expert_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, top_k_index: torch.Tensor
) -> torch.Tensor:
    """``expert_linear`` in float32 ``[P, num_out]``, in plain torch; the choice is ``[T, k]``."""
    pairs = top_k_index.flatten()
    rows = x.float().repeat_interleave(len(pairs) // len(x), dim=0)
    out = rows.new_empty(len(pairs), weight.shape[1])
    for expert in sorted(set(pairs.tolist())):
        out[pairs == expert] = rows[pairs == expert] @ weight[expert].float().t()
        if bias is not None:
            out[pairs == expert] += bias[expert].float()
    return out


def _check_bias(bias: torch.Tensor | None, order: ExpertOrder, num_out: int) -> None:
    if bias is None:
        return
    check_tensor("bias", bias, (order.num_experts, num_out))
    if not bias.is_contiguous():
        raise ValueError(f"bias has strides {list(bias.stride())}: it must be contiguous")


def _check_rows(x: torch.Tensor, order: ExpertOrder, out: torch.Tensor, num_in: int, num_out: int) -> int:
    """How many pairs a row of x is for."""
    num_pairs, num_rows = len(order.order), len(x)
    check_tensor("x", x, (None, num_in))
    check_tensor("out", out, (num_pairs, num_out), x.dtype)
    if num_pairs % max(1, num_rows) or (num_rows == 0) != (num_pairs == 0):
        raise ValueError(f"x has {num_rows} rows for {num_pairs} pairs: each must be for as many")
    return num_pairs // max(1, num_rows)


def _tile(x: torch.Tensor, order: ExpertOrder, tiles: Mapping[int, ProductTile]) -> ProductTile:
    rows = (_FLOAT32_TILE.rows,) if x.dtype == torch.float32 else BLOCK_ROWS
    if order.rows not in rows:
        raise ValueError(f"blocks have {order.rows} rows: one of {', '.join(map(str, rows))} in {x.dtype}")
    return _FLOAT32_TILE if x.dtype == torch.float32 else tiles[order.rows]


def _parts(workspace: SplitWorkspace, num_splits: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where a split product is summed."""
    return (workspace.partials, workspace.arrivals) if num_splits > 1 else (None, None)
