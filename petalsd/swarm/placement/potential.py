"""The soft minimum of the cover, and what each possible move of some servers would do to it.

The throughput of a swarm is the cover of its weakest block. Its soft minimum -tau * log(sum over blocks of
exp(-cover / tau)) also counts blocks that are nearly as weak, so that a move helps even where several blocks
are weakest, and a swarm in which every move raises it cannot go round in circles.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.state import Flags, Floats, Ints, SwarmState

_NOTHING = 1e-6  # of a server's throughput: what rounding leaves of a block that nobody serves
_HOLE = 1e100
_MAX_EXPONENT = 200.0  # far above what a swarm with anything served can have, and e to it below _HOLE
_TINY = 1e-300  # below what a sum of weights can be


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """Server ``row`` should start at block ``target``; ``value`` is what that wins over the horizon, in tokens.

    ``in_chain``: it pays only together with the other moves of its list, and may be worth less than nothing alone.
    """

    row: int
    target: int
    value: float
    in_chain: bool = False


def soft_minimum(cover: Floats, tau: float) -> float:
    """Tokens/s; at most ``cover.min()``, and less the more blocks are about as weak."""
    lowest = float(cover.min())
    return lowest - tau * float(np.log(np.exp((lowest - cover) / tau).sum()))


def scale(state: SwarmState, policy: Policy, extra: float = 0.0) -> float:
    """The soft minimum's tau in tokens/s; ``extra`` is the mean cover that a newcomer adds."""
    return max(policy.softness * (state.mean_cover() + extra), 1e-9)


class Landscape:
    """What moves are worth while planned moves are put in: ``cover`` and ``served`` change with each ``move``."""

    def __init__(self, state: SwarmState, policy: Policy) -> None:
        self.policy = policy
        self.num_blocks = state.num_blocks
        self._block = np.arange(state.num_blocks)
        self.tau = scale(state, policy)
        self.length, self.throughput = state.length, state.throughput
        self.start = state.start.copy()
        self.cover = state.planned_cover()
        self.served = state.served_cover()

    def copy(self) -> Landscape:
        """One in which other moves can be put."""
        other = copy.copy(self)
        other.start, other.cover, other.served = self.start.copy(), self.cover.copy(), self.served.copy()
        return other

    def move(self, row: int, target: int) -> None:
        """Server ``row`` leaves for the blocks from ``target``; what it leaves is not served any more."""
        at, length, rate = int(self.start[row]), int(self.length[row]), float(self.throughput[row])
        self.cover[at : at + length] -= rate
        self.cover[target : target + length] += rate
        leaving = np.ones(length, bool)
        leaving[max(target - at, 0) : max(target - at + length, 0)] = False
        self.served[at : at + length] -= rate * leaving
        self.start[row] = target

    def values(self, rows: Ints) -> Floats:
        """[K, num_blocks] tokens won over the horizon if server ``rows[k]`` moved to start at each block.

        Costs count ``policy.margin`` times. 0 where it is, -inf where its span would not fit.
        """
        policy, length = self.policy, self.length[rows][:, None].astype(float)
        part = np.minimum(np.abs(self._block - self.start[rows][:, None]) / length, 1.0)
        load_s = policy.load_s(length) * part
        work = self.throughput[rows][:, None] * length / self.num_blocks
        costs = self.losses(rows) * (policy.leaving_share * load_s)
        costs += (policy.move_s * work) * part
        if not np.array_equal(self.served, self.cover):
            costs += policy.pending_s * np.maximum(-self._gains(rows, self.served, 0.0), 0.0)
        values: Floats = self.gains(rows) * policy.lasting_s(load_s)
        values -= policy.margin * costs
        return values

    def gains(self, rows: Ints) -> Floats:
        """[K, num_blocks] tokens/s by which the soft minimum rises, once all is loaded."""
        return self._gains(rows, self.cover, -np.inf)

    def _gains(self, rows: Ints, cover: Floats, misfit: float) -> Floats:
        """The same from another cover, with ``misfit`` where the span would not fit."""
        tau, at, length = self.tau, self.start[rows][:, None], self.length[rows][:, None]
        rate, block = self.throughput[rows][:, None], self._block
        without = cover - rate * self._own(rows)
        weight = np.exp((without.min(1, keepdims=True) - without) / tau)
        before, inside = _sums(weight), _sums(weight * np.exp(-rate / tau))
        behind = _sums(weight[:, ::-1])[:, ::-1]
        end = np.minimum(block + length, self.num_blocks)
        total = before[:, :-1] + _columns(behind, end)
        total += _columns(inside, end) - inside[:, :-1]
        level = -tau * np.log(np.maximum(total, _TINY))
        level -= _columns(level, at)
        level[block + length > self.num_blocks] = misfit
        return level

    def losses(self, rows: Ints) -> Floats:
        """[K, num_blocks] tokens/s that the swarm lacks while a server loads: it has left its leaving blocks."""
        at, length = self.start[rows][:, None], self.length[rows][:, None]
        rate = self.throughput[rows][:, None]
        tau, lowest = self.tau, float(self.served.min())
        if lowest <= _NOTHING * float(rate.max()):
            return np.zeros((len(rows), self.num_blocks))  # no chain serves anybody: there is nothing to lose
        weight = np.exp((lowest - self.served) / tau)
        more = weight * np.expm1(np.minimum(rate / tau, _MAX_EXPONENT))
        # A hole is far more than all other weights together, so that its presence shows in the same sum.
        more[self.served - rate <= _NOTHING * rate] = _HOLE
        more *= self._own(rows)
        rises = self._leaving(more, at, length)
        loss = np.minimum(tau * np.log1p(rises / float(weight.sum())), lowest)
        return np.where(rises >= _HOLE / 2, self.policy.hole_weight * lowest, loss)

    def _own(self, rows: Ints) -> Flags:
        """[K, num_blocks] whether a block is one of the server's."""
        at = self.start[rows][:, None]
        return (self._block >= at) & (self._block < at + self.length[rows][:, None])

    def _leaving(self, table: Floats, at: Ints, length: Ints) -> Floats:
        """[K, L] sums over the own blocks that a start at each block leaves; ``table`` is 0 outside of them.

        Summed from the end that is left, as differences of large sums would lose the small ones.
        """
        from_left, from_right = _sums(table)[:, :-1], _sums(table[:, ::-1])[:, ::-1]
        end = np.minimum(self._block + length, self.num_blocks)
        return np.where(self._block >= at, from_left, _columns(from_right, end))


def _sums(table: Floats) -> Floats:
    """[K, L] -> [K, L + 1]: sums of the first 0, 1, ... columns."""
    out = np.empty((table.shape[0], table.shape[1] + 1))
    out[:, 0] = 0.0
    np.cumsum(table, axis=1, out=out[:, 1:])
    return out


def _columns(table: Floats, at: Ints) -> Floats:
    """[K, M] of each row of ``table`` the columns ``at`` [K, M]."""
    taken: Floats = table[np.arange(len(table))[:, None], at]
    return taken
