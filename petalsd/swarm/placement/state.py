"""A swarm as placement sees it: one row per server, in order of PeerID."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from petalsd.types import BlockSpan

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

_COLUMNS = ("start", "length", "served_start", "served_end", "throughput", "is_free", "is_pledged")


@dataclass(frozen=True, slots=True, eq=False)
class SwarmState:
    """``N`` servers of a model of ``num_blocks`` blocks.

    peers         [N] base58 PeerIDs, ascending: ties between servers go to the first
    start         [N] int64, first block of what each serves or is loading
    length        [N] int64, how many blocks that is, at least 1
    served_start  [N] int64, and
    served_end    [N] int64: the blocks that it serves now, equal where it serves none yet
    throughput    [N] float64, tokens/s through each of its blocks, not negative
    is_free       [N] bool, whether it follows this rule, serves all that it announced, and could stand elsewhere
    is_pledged    [N] bool, whether it says that its place is for the rule to choose: others may rely on its moves
    """

    num_blocks: int
    peers: Sequence[str]
    start: Ints
    length: Ints
    served_start: Ints
    served_end: Ints
    throughput: Floats
    is_free: Flags
    is_pledged: Flags

    @property
    def is_settled(self) -> bool:
        """Whether all serve what they announced."""
        end = self.start + self.length
        return np.array_equal(self.served_start, self.start) and np.array_equal(self.served_end, end)

    def planned_cover(self) -> Floats:
        """[num_blocks] tokens/s of each block once everything announced is loaded."""
        return cover(self.num_blocks, self.start, self.start + self.length, self.throughput)

    def served_cover(self) -> Floats:
        """[num_blocks] tokens/s of each block now."""
        return cover(self.num_blocks, self.served_start, self.served_end, self.throughput)

    def mean_cover(self) -> float:
        """Tokens/s per block if all servers' work could be spread evenly: no placement is better than that."""
        return float(self.length @ self.throughput) / self.num_blocks

    def without(self, peer: str) -> SwarmState:
        """The same state with one server left out, if it is there."""
        keep = np.array([one != peer for one in self.peers], bool)
        columns = {name: getattr(self, name)[keep] for name in _COLUMNS}
        return replace(self, peers=[one for one in self.peers if one != peer], **columns)

    def moved(self, row: int, target: BlockSpan) -> SwarmState:
        """The same state when server ``row`` has begun to move: it still serves what is in both spans."""
        columns = {name: getattr(self, name).copy() for name in _COLUMNS}
        start = max(int(self.served_start[row]), target.start)
        end = max(start, min(int(self.served_end[row]), target.end))
        columns["start"][row], columns["length"][row] = target.start, len(target)
        columns["served_start"][row], columns["served_end"][row] = start, end
        columns["is_free"][row] = False
        return replace(self, **columns)

    def row_of(self, peer: str) -> int:
        """ValueError for a server that is not in this state."""
        try:
            return self.peers.index(peer)
        except ValueError:
            raise ValueError(f"{peer} has no span here") from None


def cover(num_blocks: int, start: Ints, end: Ints, throughput: Floats) -> Floats:
    """[num_blocks] the summed ``throughput`` of the spans ``[start, end)`` with that block, exactly 0 for none."""
    size = num_blocks + 1
    change = np.bincount(start, throughput, size) - np.bincount(end, throughput, size)
    servers = np.cumsum(np.bincount(start, minlength=size) - np.bincount(end, minlength=size))[:-1]
    return np.where(servers > 0, np.maximum(np.cumsum(change)[:-1], 0.0), 0.0)
