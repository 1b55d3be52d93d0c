"""Moves that pay only together: one server goes where it is needed most, others close the gap that it leaves.

Where no single move pays a swarm may still be far from its best: two blocks have nobody, three are served twice
elsewhere, and all servers in between would have to shift by a few blocks. Such moves are ejection chains (Glover,
"Ejection chains, reference structures and alternating path methods for traveling salesman problems", 1996): each
goes to the block that is weakest after those before it, whatever it leaves behind. A beam search keeps the chains
that are worth most so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.potential import Landscape, PlannedMove
from petalsd.swarm.placement.state import Flags, Ints, SwarmState

_LONGEST = 5  # moves of a chain: longer ones were found no more often
_BEAM = 8  # chains that are looked at further, and continuations of each
_NOTHING = 1e-9  # tokens: what rounding makes of staying


@dataclass(frozen=True, slots=True, eq=False)
class _Chain:
    """``moves``, the swarm that they leave behind, and what they win together, in tokens."""

    moves: tuple[PlannedMove, ...]
    land: Landscape
    value: float

    @property
    def key(self) -> frozenset[tuple[int, int]]:
        """The same for the same moves in another order."""
        return frozenset((move.row, move.target) for move in self.moves)

    def then(self, move: PlannedMove) -> _Chain:
        land = self.land.copy()
        land.move(move.row, move.target)
        return _Chain((*self.moves, move), land, self.value + move.value)


def plan_chain(state: SwarmState, policy: Policy) -> list[PlannedMove]:
    """The moves that win most together, in the order in which they were judged; none where nothing is won.

    Of servers that the others can rely on: a chain that lacks a move may leave the swarm worse than it was.
    """
    rows: Ints = np.flatnonzero(state.is_free & state.is_pledged)
    best = _Chain((), Landscape(state, policy), _NOTHING)
    beam = [best]
    for _ in range(min(_LONGEST, len(rows))):
        beam = _longer(beam, rows)
        best = max([best, *beam], key=lambda chain: chain.value)
    return list(best.moves)


def _longer(beam: list[_Chain], rows: Ints) -> list[_Chain]:
    """The best chains with one move more, each set of moves once."""
    steps = [(chain, move) for chain in beam for move in _steps(chain, rows)]
    steps.sort(key=lambda step: -(step[0].value + step[1].value))
    found: dict[frozenset[tuple[int, int]], _Chain] = {}
    for chain, move in steps:
        key = chain.key | {(move.row, move.target)}
        if key not in found:
            found[key] = chain.then(move)
        if len(found) == _BEAM:
            break
    return list(found.values())


def _steps(chain: _Chain, rows: Ints) -> list[PlannedMove]:
    """The best move each of the servers that are worth most at the weakest block, where they are not yet."""
    land, moved = chain.land, [move.row for move in chain.moves]
    rows = rows[~np.isin(rows, moved)]
    if not len(rows):
        return []
    values = np.where(_come_to(land, rows, int(land.cover.argmin())), land.values(rows), -np.inf)
    best, target = values.max(1), values.argmax(1)
    order = np.argsort(-best, kind="stable")[:_BEAM]
    return [
        PlannedMove(int(rows[at]), int(target[at]), float(best[at]), in_chain=True)
        for at in order.tolist()
        if np.isfinite(best[at])
    ]


def _come_to(land: Landscape, rows: Ints, block: int) -> Flags:
    """[K, num_blocks] bool, whether a start at each block brings server ``rows[k]`` to ``block``."""
    at, length = land.start[rows][:, None], land.length[rows][:, None]
    start = np.arange(land.num_blocks)
    is_there = (at <= block) & (block < at + length)
    return (start <= block) & (block < start + length) & ~is_there
