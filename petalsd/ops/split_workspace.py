"""How products of few rows are divided among the programs of a GPU, and the memory that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

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

    def current(self) -> SplitWorkspace:
        """As ``StreamWorkspaces.current`` where all work is in one order."""
        return self

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


class Workspaces(Protocol):
    """Where products find the workspace for what is launched now."""

    def current(self) -> SplitWorkspace: ...


class StreamWorkspaces:
    """One for each stream of a device that products are launched on; from any thread.

    A block is tried on one stream while another that is to be captured runs on a second: two products at the same
    time would add up each other's parts, and leave arrivals that no later product expects.

    current_stream  its number; by default that of this thread on CUDA, and one for all work elsewhere
    """

    def __init__(
        self, device: torch.device, num_multiprocessors: int, current_stream: Callable[[], int] | None = None
    ) -> None:
        self._device = device
        self._num_multiprocessors = num_multiprocessors
        self._current_stream = current_stream or partial(_current_stream, device)
        self._workspaces: dict[int, SplitWorkspace] = {}

    def current(self) -> SplitWorkspace:
        """The stream's. What is captured must have run on the same stream before: no memory is taken then."""
        stream = self._current_stream()
        found = self._workspaces.get(stream)
        if found is None:
            made = SplitWorkspace.allocate(self._device, self._num_multiprocessors)
            found = self._workspaces.setdefault(stream, made)
        return found


def _current_stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0
