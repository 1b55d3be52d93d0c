"""How products of few rows are divided among the programs of a GPU, and the memory that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petalsd.ops.launching import Options

VALUES_PER_MULTIPROCESSOR = 1 << 14
PROGRAMS_PER_MULTIPROCESSOR = 16
"""Room for what the programs of any ``ProductTile`` leave there."""

_MIN_PIECES_PER_SPLIT = 4
_MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class ProductTile:
    """What a program computes: rows and outputs at once, and how many inputs a step of its loop takes.

    programs  of one multiprocessor that a product should have; they need not fit at the same time
    """

    rows: int
    outputs: int
    inputs: int
    options: Options
    programs: int


def tile_for(rows: int, tiles: Sequence[ProductTile]) -> ProductTile:
    """The first one with enough rows. The last one repeats: its other reads of a weight mostly find it cached."""
    return next((tile for tile in tiles if rows <= tile.rows), tiles[-1])


@dataclass(frozen=True, slots=True)
class SplitWorkspace:
    """Where the programs that share a tile of few rows add up their parts; for products one after the other.

    partials             float32, of all programs
    arrivals             int32 ``[programs]``, zeros between launches
    num_multiprocessors  of the device: how many programs are wanted follows from it
    """

    partials: torch.Tensor
    arrivals: torch.Tensor
    num_multiprocessors: int

    @classmethod
    def allocate(cls, device: torch.device, num_multiprocessors: int) -> SplitWorkspace:
        """64 KB for each multiprocessor."""
        partials = torch.empty(VALUES_PER_MULTIPROCESSOR * num_multiprocessors, device=device)
        programs = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors
        arrivals = torch.zeros(programs, dtype=torch.int32, device=device)
        return cls(partials, arrivals, num_multiprocessors)

    def num_splits(self, tile: ProductTile, num_tiles: int, num_in: int) -> int:
        """Into how many programs the inputs of each tile are split: a power of two, so that few kernels exist.

        With as many programs in all as the tile asks for. There may be no tiles.
        """
        wanted = min(
            _MAX_SPLITS,
            tile.programs * self.num_multiprocessors // max(1, num_tiles),
            -(-num_in // tile.inputs) // _MIN_PIECES_PER_SPLIT,
        )
        return 1 << max(0, wanted.bit_length() - 1)
