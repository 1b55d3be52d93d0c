"""The directory as a server sees it: announcements that have arrived, and the records of those that crashed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from benchmarks.swarm_sim.fleet import Array, Flags, Fleet, Ints
from petalsd.swarm.placement.lengths import Lengths
from petalsd.swarm.placement.state import SwarmState
from petalsd.types import BlockSpan

OFFLINE, JOINING, ONLINE = 0, 1, 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Record:
    """One server's announcement: ``[start, end)`` is what is read of it.

    ``goal``: what it will have, None: the same. ``is_settling``: it says that it came a short while ago.
    """

    state: int = OFFLINE
    start: int = 0
    end: int = 0
    goal: BlockSpan | None = None
    is_settling: bool = False

    @property
    def claim(self) -> BlockSpan:
        return self.goal or BlockSpan(self.start, self.end)


@dataclass(slots=True)
class Server:
    """What a server knows about itself: ``n`` blocks that it serves or is to, throughput, where it is, since when.

    longest  how many blocks it holds
    block_s  time to load one
    silent   rows of those that did not answer its own pings when it checked last
    """

    row: int
    n: int
    t: float
    longest: int
    block_s: float
    start: int = -1
    since: float = -math.inf
    silent: frozenset[int] = frozenset()

    @property
    def span(self) -> BlockSpan:
        return BlockSpan(self.start, self.start + self.n)


class View:
    """Arrays with one entry per server that ever was; sums of the cover are kept up to date.

    ``follows`` says who follows petalsd's rule, which records tell by their version. ``is_dead`` marks records
    whose server did not answer pings; only petalsd looks at that.
    """

    def __init__(self, blocks: int, fleet: Fleet, follows: Flags) -> None:
        count = len(fleet.n)
        self.blocks, self.hardware, self.follows = blocks, fleet.hardware, follows
        self.n, self.t = fleet.n.copy(), fleet.t
        self.state: Ints = np.zeros(count, np.int64)
        self.start: Ints = np.zeros(count, np.int64)
        self.end: Ints = np.zeros(count, np.int64)
        self.goal: Ints = np.zeros(count, np.int64)
        self.names = [f"{row:06d}" for row in range(count)]
        self.is_dead: Flags = np.zeros(count, bool)
        self.is_settling: Flags = np.zeros(count, bool)
        self.cover: Array = np.zeros(blocks)
        self.mass = 0.0
        self.version = 0
        self._cache: dict[Any, tuple[int, Any]] = {}

    def put(self, row: int, record: Record) -> None:
        if self.state[row]:
            self.cover[self.start[row] : self.end[row]] -= self.t[row]
            self.mass -= self.n[row] * self.t[row]
        self.state[row], self.is_dead[row] = record.state, False
        self.is_settling[row] = record.is_settling
        if record.state:
            self.start[row], self.end[row], self.goal[row] = record.start, record.end, record.claim.start
            self.n[row] = len(record.claim)
            self.t[row] = self.hardware.throughput(row, len(record.claim))
            self.cover[record.start : record.end] += self.t[row]
            self.mass += self.n[row] * self.t[row]
        self.version += 1

    def declare_dead(self, row: int) -> None:
        self.is_dead[row] = True
        self.version += 1

    def settle(self, row: int) -> None:
        self.is_settling[row] = False
        self.version += 1

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """Servers that see the same view share what they derive from it: that saves simulation time only."""
        hit = self._cache.get(key)
        if hit is None or hit[0] != self.version:
            hit = self._cache[key] = (self.version, make())
        result: T = hit[1]
        return result

    def listed(self) -> Ints:
        """Rows of all servers with a record that is not OFFLINE."""
        return self.cached("listed", lambda: np.flatnonzero(self.state))

    def believed(self) -> Ints:
        """Rows of the servers with such a record whom nobody has declared dead."""
        return self.cached("believed", lambda: np.flatnonzero((self.state > 0) & ~self.is_dead))

    def swarm_state(self, silent: frozenset[int] = frozenset()) -> tuple[SwarmState, Ints]:
        """What petalsd's placement gets where those of ``silent`` are known to be gone; each server's row."""
        return self.cached(("swarm_state", silent), lambda: self._swarm_state(silent))

    def _swarm_state(self, silent: frozenset[int]) -> tuple[SwarmState, Ints]:
        rows = self.believed()
        if silent:
            rows = rows[[row not in silent for row in rows.tolist()]]
        is_online, n, goal = self.state[rows] == ONLINE, self.n[rows], self.goal[rows]
        start, end = np.where(is_online, self.start[rows], 0), np.where(is_online, self.end[rows], 0)
        state = SwarmState(
            num_blocks=self.blocks,
            peers=[self.names[row] for row in rows.tolist()],
            start=goal,
            length=n,
            served_start=start,
            served_end=end,
            throughput=self.t[rows],
            is_free=is_online & self.follows[rows] & (start == goal) & (end - start == n) & (n < self.blocks),
            is_pledged=self.follows[rows],
        )
        if state.planned_cover().min() > 0:
            state = replace(state, is_free=state.is_free & ~self.is_settling[rows])
        return state, rows

    def lengths(self, rows: Ints, is_free: Flags) -> list[Lengths | None]:
        """What the records of ``rows`` say of how many blocks each may serve; as the daemon reads it."""
        kind = self.hardware
        return [
            Lengths(int(kind.n[row]), float(kind.device[row]), float(kind.link[row])) if free else None
            for row, free in zip(rows.tolist(), is_free.tolist(), strict=True)
        ]
