"""The rules that are compared: petalsd's own code, and stock Petals' rule."""

from __future__ import annotations

from typing import Final, Literal, Protocol

import numpy as np

from benchmarks.swarm_sim.petals_rule import best_start, should_move
from benchmarks.swarm_sim.view import Server, View
from petalsd.swarm.placement.decision import MoveCosts, OwnSpan, decide
from petalsd.swarm.placement.joining import choose_start
from petalsd.swarm.placement.lengths import wishing, with_lengths
from petalsd.swarm.placement.plan import plan_moves
from petalsd.swarm.placement.policy import Policy as Constants
from petalsd.types import BlockSpan

Rng = np.random.Generator
LEAVE: Final = "leave"  # stop serving, then choose again
Goal = BlockSpan | Literal["leave"] | None


class Policy(Protocol):
    """follows  whether it takes turns by petalsd's rule, keeps the overlap of a move and hands sessions over
    check_s     mean time between checks, 0 for the scenario's
    min_stay_s  how long a server that has come says so
    """

    follows: bool
    check_s: float
    min_stay_s: float

    def choose_start(self, view: View, server: Server, rng: Rng) -> int: ...

    def should_move(self, view: View, server: Server, rng: Rng, now: float) -> Goal:
        """None: stay; LEAVE: stop and choose again later; a span: serve that instead."""


class PetalsPolicy:
    """``quality`` 0 joins as Petals does and never moves."""

    follows, check_s, min_stay_s = False, 0.0, 0.0

    def __init__(self, quality: float = 0.75) -> None:
        self.quality = quality

    def choose_start(self, view: View, server: Server, rng: Rng) -> int:
        return best_start(view.cover, server.n)

    def should_move(self, view: View, server: Server, rng: Rng, now: float) -> Goal:
        rows = view.listed()
        own = int(np.searchsorted(rows, server.row))
        if own == len(rows) or rows[own] != server.row:
            return None
        bound = view.mass / view.blocks
        spans = (view.start[rows], view.end[rows], view.t[rows])
        return LEAVE if should_move(spans, own, view.cover, self.quality, bound, rng) else None


class PetalsdPolicy:
    """The product's placement, with the daemon's defaults: balance_period_s = 10, balance_quality = 0.75.

    The list of moves is shared among servers with equal views, as it would be equal; those on it decide.
    """

    follows, check_s = True, 10.0

    def __init__(self, constants: Constants | None = None, quality: float = 0.75) -> None:
        self.constants = constants or Constants()
        self.margin = 1 / quality
        self.min_stay_s = self.constants.min_stay_s

    def choose_start(self, view: View, server: Server, rng: Rng) -> int:
        state, _ = view.swarm_state()
        return choose_start(state, server.n, server.t, self.constants)

    def should_move(self, view: View, server: Server, rng: Rng, now: float) -> Goal:
        if server.row not in view.cached((self, server.silent), lambda: self._may_go(view, server.silent)):
            return None
        state, rows = view.swarm_state(server.silent)
        own = OwnSpan(view.names[server.row], server.span, now - server.since)
        costs = MoveCosts(load_block_s=server.block_s, margin=self.margin)
        decision = decide(state, own, costs, self.constants)
        lengths = view.lengths(rows, state.is_free)
        decision = with_lengths(decision, state, lengths, own, costs, self.constants)
        return decision.target if decision.is_move else None

    def _may_go(self, view: View, silent: frozenset[int]) -> set[int]:
        """Who is on the list of moves; where nobody is, whoever would rather serve another number of blocks."""
        state, rows = view.swarm_state(silent)
        moves = plan_moves(state, self.constants)
        listed = [move.row for move in moves] or wishing(
            state, view.lengths(rows, state.is_free), self.constants
        )
        return {int(rows[row]) for row in listed}
