"""The list of moves that a swarm should begin now: every server derives it, and those on it go."""

from __future__ import annotations

import numpy as np

from petalsd.swarm.placement.chains import plan_chain
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.potential import Landscape, PlannedMove
from petalsd.swarm.placement.state import Ints, SwarmState

_LOOK_AGAIN = 8  # candidates whose value is computed anew after each planned move
_NOTHING = 1e-9  # tokens: what rounding makes of staying


def plan_moves(state: SwarmState, policy: Policy) -> list[PlannedMove]:
    """Those that win most: best replies, each of which pays, or in small swarms a chain, which pays as a whole."""
    policy = policy.seen(state)
    moves = _best_replies(state, policy)
    if not _may_chain(state, policy):
        return moves
    chain = plan_chain(state, policy)
    return max(moves, chain, key=lambda plan: sum(move.value for move in plan))


def _may_chain(state: SwarmState, policy: Policy) -> bool:
    """While others load a chain disturbs more than it wins; where a block has nobody nothing is disturbed."""
    if len(state.peers) > policy.chain_servers:
        return False
    return state.is_settled or float(state.planned_cover().min()) <= 0


def _best_replies(state: SwarmState, policy: Policy) -> list[PlannedMove]:
    """The most valuable first, each to the state that those before it leave behind."""
    land, num_moves = Landscape(state, policy), policy.num_moves(len(state.peers))
    rows = _candidates(state, land, policy.candidates_per_move * num_moves)
    if not len(rows):
        return []
    values = land.values(rows)
    best, target = values.max(1), values.argmax(1)
    moves: list[PlannedMove] = []
    while len(moves) < num_moves:
        first = np.argsort(-best, kind="stable")[:_LOOK_AGAIN]
        first = np.sort(first[np.isfinite(best[first])])
        if not len(first):
            break
        if moves:  # those before changed what the others are worth, but hardly who is worth most
            values = land.values(rows[first])
            best[first], target[first] = values.max(1), values.argmax(1)
        at = int(first[best[first].argmax()])
        if best[at] <= _NOTHING:
            break
        row = int(rows[at])
        moves.append(PlannedMove(row, int(target[at]), float(best[at])))
        land.move(row, int(target[at]))
        best[at] = -np.inf
    return moves


def _candidates(state: SwarmState, land: Landscape, count: int) -> Ints:
    """Rows of free servers, those whose blocks are needed least where there are many; ascending."""
    rows: Ints = np.flatnonzero(state.is_free)
    if len(rows) <= count:
        return rows
    weight = np.exp(np.maximum((land.cover.min() - land.cover) / land.tau, -60.0))
    total = np.concatenate(([0.0], np.cumsum(weight)))
    need = (total[state.start[rows] + state.length[rows]] - total[state.start[rows]]) / state.length[rows]
    return np.sort(rows[np.argpartition(need, count)[:count]])
