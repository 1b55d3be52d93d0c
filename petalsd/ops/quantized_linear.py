"""Products with int8 and int4 weights on a GPU over the CPU's own storage of them; of few rows in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from petalsd.kernels.quantized_linear import quantized_linear_kernel
from petalsd.ops.launching import Options, check_tensor, launch, strides, takes_ptx
from petalsd.ops.packed_weight import GROUP_INPUTS, PackedWeight, WeightFormat
from petalsd.ops.unpacked_linear import unpacked_linear

_BITS = {WeightFormat.INT8: 8, WeightFormat.INT4: 4}
MAX_ROWS = 64
"""Beyond, weights are unpacked for a dense product."""

_PROGRAMS_PER_MULTIPROCESSOR = 4
_MIN_PIECES_PER_SPLIT = 4
_MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class _Tile:
    """What a program computes: rows and outputs at once, and how many inputs a step of its loop takes."""

    rows: int
    outputs: int
    inputs: int
    options: Options


# The first one with enough rows; the last one repeats: another read of a weight mostly finds it in the cache. All
# stay within 99 KB of shared memory, and none spills. Measured on an H200; of 64 rows at once, whose weights pass
# through shared memory there, int8 gains and int4 does not.
_FEW_ROWS = _Tile(16, 128, 128, Options(num_warps=4, num_stages=3))
_MORE_ROWS = _Tile(32, 128, 64, Options(num_warps=4, num_stages=4))
_TILES = {
    8: (_FEW_ROWS, _MORE_ROWS, _Tile(64, 64, 64, Options(num_warps=4, num_stages=4))),
    4: (_FEW_ROWS, _MORE_ROWS),
}
# Multiplied without matrix units, from registers. Larger tiles spill, and on 10.0 Triton rounds them to TF32.
_FLOAT32_TILE = _Tile(16, 32, 32, Options(num_warps=4, num_stages=3))
_TILE_VALUES = max(tile.rows * tile.outputs for tile in (*_TILES[8], _FLOAT32_TILE))


@dataclass(frozen=True, slots=True)
class SplitWorkspace:
    """Where the programs that share a tile of few rows add up their parts; for products one after the other.

    partials             float32 ``[programs, values of a tile]``
    arrivals             int32 ``[programs]``, zeros between launches
    num_multiprocessors  of the device: how many programs are wanted follows from it
    """

    partials: torch.Tensor
    arrivals: torch.Tensor
    num_multiprocessors: int

    @classmethod
    def allocate(cls, device: torch.device, num_multiprocessors: int) -> SplitWorkspace:
        """64 KB for each multiprocessor."""
        programs = _PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors
        partials = torch.empty(programs, _TILE_VALUES, device=device)
        return cls(partials, torch.zeros(programs, dtype=torch.int32, device=device), num_multiprocessors)

    def num_splits(self, num_tiles: int, num_pieces: int) -> int:
        """Into how many programs the inputs of each tile are split: a power of two, so that few kernels exist.

        With as many programs in all as there is room for. There may be no tiles.
        """
        wanted = min(
            _MAX_SPLITS,
            _PROGRAMS_PER_MULTIPROCESSOR * self.num_multiprocessors // max(1, num_tiles),
            num_pieces // _MIN_PIECES_PER_SPLIT,
        )
        return 1 << max(0, wanted.bit_length() - 1)


def quantized_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: SplitWorkspace,
) -> None:
    """``out = x @ weight.T + bias``; sums are float32, and rounded once.

    x       ``[R, num_in]``
    weight  int8 or int4, on x's device
    bias    ``[num_out]``
    out     ``[R, num_out]``

    ValueError for tensors that don't fit, and other formats.
    """
    rows = len(x)
    if weight.format not in _BITS or weight.scales is None:
        raise ValueError(f"the weight's format is {weight.format}: it must be int8 or int4")
    check_tensor("x", x, (None, weight.num_in))
    check_tensor("out", out, (rows, weight.num_out))
    if bias is not None:
        check_tensor("bias", bias, (weight.num_out,))
    if rows > MAX_ROWS:
        unpacked_linear(x, weight, bias, out)
        return
    bits = _BITS[weight.format]
    tile = _tile_of(rows, bits, x.dtype)
    inputs = tile.inputs if bits == 8 else max(tile.inputs, GROUP_INPUTS)
    grid = (-(-rows // tile.rows), -(-weight.num_out // tile.outputs))
    num_splits = workspace.num_splits(grid[0] * grid[1], -(-weight.num_in // inputs))
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
        },
        tile.options,
    )  # fmt: skip


def _tile_of(rows: int, bits: int, dtype: torch.dtype) -> _Tile:
    if dtype == torch.float32:
        return _FLOAT32_TILE
    tiles = _TILES[bits]
    return next((tile for tile in tiles if rows <= tile.rows), tiles[-1])


def reference_quantized_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """The product in float32 ``[R, num_out]``, in plain torch over the unpacked weight."""
    product = x.float() @ weight.unpack(torch.float32).t()
    return product if bias is None else product + bias.float()
