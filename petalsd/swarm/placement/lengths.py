"""How many blocks a server serves, where that is its own to say: as many as it holds, or fewer and those faster.

A server of n blocks brings t(n) tokens/s to each of them, the figure by which the swarm compares servers
(protocol.md 6.4): W where the link bounds it, for any n, and 2F / (n + 1) where the device does, with F tokens/s
through one block. So fewer blocks never help where the link is the bound. Where the device is, n * t(n) is nearly
the same for all n: the work can go where the swarm is weak, at next to no loss. Small swarms gain by that, whose
spans do not tile the model evenly; large ones have a server for every place, and nothing left to gain.

    lengths = read_lengths(view, state)
    decision = with_lengths(decide(state, own, costs, policy), state, lengths, own, costs, policy)

A newcomer serves all that it can: who comes after it is not known yet, and giving blocks up later costs nothing.
Only spans inside the present one, or around it, are looked at: whoever should go elsewhere moves first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from petalsd.swarm.directory import SwarmView
from petalsd.swarm.placement.decision import Decision, Estimate, MoveCosts, OwnSpan, Turn, Verdict, own_turn
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.potential import scale, soft_minimum
from petalsd.swarm.placement.state import Floats, Ints, SwarmState
from petalsd.swarm.protocol import announced_throughput
from petalsd.types import BlockSpan

# Where devices bound the servers, the weakest block gained 15 % in random swarms of 10, 2 % in those of 30 and
# less than 1 % in those of 60: beyond this nobody gives blocks up.
_MAX_SERVERS = 64
_MARGIN = 2.0  # a change must win that many times what it costs, whatever a server asks of moves
_NOTHING = 1e-9  # what rounding makes of equal sums
_STEEPEST = 600.0  # exponents beyond it make no difference any more


@dataclass(frozen=True, slots=True)
class Lengths:
    """What a server may choose from: up to ``longest`` blocks, with the rates that it announces, in tokens/s."""

    longest: int
    forward_rps: float
    network_rps: float
    is_relayed: bool = False

    def throughput(self, num_blocks: int) -> float:
        """Tokens/s through each of so many blocks."""
        return announced_throughput(
            self.forward_rps, self.network_rps, num_blocks, is_relayed=self.is_relayed
        )


def read_lengths(view: SwarmView, state: SwarmState) -> list[Lengths | None]:
    """[N] of the servers of ``state``; None for those that do not say, and for those that are not free."""
    return [
        _lengths_of(view, peer, int(start)) if is_free else None
        for peer, start, is_free in zip(state.peers, state.start, state.is_free, strict=True)
    ]


def _lengths_of(view: SwarmView, peer: str, block: int) -> Lengths | None:
    record = view.blocks[block].get(peer)
    if record is None or not (record.max_blocks and record.forward_rps and record.network_rps):
        return None
    return Lengths(
        min(record.max_blocks, view.num_blocks),
        record.forward_rps,
        record.network_rps,
        bool(record.using_relay),
    )


def with_lengths(
    decision: Decision,
    state: SwarmState,
    lengths: Sequence[Lengths | None],
    own: OwnSpan,
    costs: MoveCosts,
    policy: Policy,
) -> Decision:
    """``decision`` where that is to move, or others are to; else what another length at this place comes to.

    Turns: every server derives the same wishes from the same view. Of those that touch the same blocks the most
    valuable comes first, the others wait and look again. So nobody gives blocks up because another one does not.
    """
    if decision.verdict is not Verdict.FITS or decision.ahead:
        return decision
    row, is_small, policy = state.row_of(own.peer), len(state.peers) <= _MAX_SERVERS, policy.seen(state)
    mine = _wish(state, row, lengths[row], policy, is_small)
    if mine is None:
        return decision
    ahead = _turns_before(mine, state, lengths, policy) if is_small else ()
    verdict = Verdict.WAITS if ahead else own_turn(own, costs, mine.figures, policy)
    return Decision(verdict, own.span, mine.target, mine.figures, ahead, decision.weakest)


def wishing(state: SwarmState, lengths: Sequence[Lengths | None], policy: Policy) -> list[int]:
    """Rows of those that would serve another number of blocks, if each were alone in the choice."""
    may_shrink, policy = len(state.peers) <= _MAX_SERVERS, policy.seen(state)
    return [row for row, its in enumerate(lengths) if _wish(state, row, its, policy, may_shrink) is not None]


def _turns_before(
    mine: _Wish, state: SwarmState, lengths: Sequence[Lengths | None], policy: Policy
) -> tuple[Turn, ...]:
    """Of others that touch the same blocks, the most valuable first; among equals the order of PeerIDs counts."""
    wishes = [
        wish
        for row, choices in enumerate(lengths)
        if row != mine.row and (wish := _wish(state, row, choices, policy, True)) is not None
    ]
    return tuple(
        Turn(state.peers[wish.row], wish.span, wish.target)
        for wish in sorted(wishes, key=lambda wish: wish.order)
        if wish.order < mine.order and wish.touched.intersect(mine.touched)
    )


class _Wish(NamedTuple):
    """``value``: tokens won beyond what the change costs."""

    row: int
    span: BlockSpan
    target: BlockSpan
    figures: Estimate

    @property
    def touched(self) -> BlockSpan:
        """The longer one holds the other."""
        return max(self.span, self.target, key=len)

    @property
    def value(self) -> float:
        return self.figures.gain_tokens - _MARGIN * self.figures.cost_tokens

    @property
    def order(self) -> tuple[float, int]:
        return -self.value, self.row


def _wish(
    state: SwarmState, row: int, lengths: Lengths | None, policy: Policy, may_shrink: bool
) -> _Wish | None:
    """What server ``row`` would do if it were alone in the choice; None if it stays as it is."""
    own = int(state.length[row])
    if lengths is None or (lengths.longest <= own and lengths.throughput(1) <= lengths.throughput(own)):
        return None  # the link is the bound, and all that fits is served
    choice = _Choice(state, row, lengths, policy)
    target = choice.best(may_shrink)
    if target == choice.span:
        return None
    wish = _Wish(row, choice.span, target, choice.estimate(target))
    return wish if wish.value > 0 else None


class _Choice:
    """Of server ``row``, beside all others: which span inside its own or around it."""

    def __init__(self, state: SwarmState, row: int, lengths: Lengths, policy: Policy) -> None:
        start = int(state.start[row])
        self.span = BlockSpan(start, start + int(state.length[row]))
        self._longest = max(lengths.longest, len(self.span))
        self._rates = np.array([0.0, *map(lengths.throughput, range(1, self._longest + 1))])
        self._policy = policy
        self._tau = scale(state, policy)
        others = state.without(state.peers[row])
        self._cover = others.planned_cover()
        is_alone = others.served_cover() <= 0
        lowest = float(self._cover_with(self.span).min())
        weight = np.exp(np.clip((lowest - self._cover) / self._tau, -_STEEPEST, _STEEPEST))
        self._before = np.concatenate(([0.0], np.cumsum(weight)))
        self._behind = np.concatenate((np.cumsum(weight[::-1])[::-1], [0.0]))
        self._alone_before = np.concatenate(([0], np.cumsum(is_alone)))

    def best(self, may_shrink: bool) -> BlockSpan:
        """The span with the highest soft minimum; the present one unless rounding alone makes another higher.

        While a block has nobody, nothing is given up.
        """
        own = self.span
        best, span = float(self._weights(*_window(own.start, own.end))[0, 0]) * (1 - _NOTHING), own
        is_whole = float(self._cover_with(own).min()) > 0
        for first, last in self._windows(may_shrink and is_whole):
            weights = self._weights(first, last)
            at = np.unravel_index(int(weights.argmin()), weights.shape)
            if weights[at] < best:
                best, span = float(weights[at]), BlockSpan(int(first[at[0]]), int(last[at[1]]))
        return span

    def estimate(self, target: BlockSpan) -> Estimate:
        """What serving ``target`` instead wins and costs.

        Giving blocks up takes no time, but the swarm may want them back before long, and that does: so the gain
        counts for what it would if they had to be loaded, and a swarm that sways moves nobody to and fro.
        """
        own, policy = self.span, self._policy
        before, after = self._cover_with(own), self._cover_with(target)
        num_changed, longer = abs(len(target) - len(own)), max(len(own), len(target))
        load_s = policy.load_s(longer) * num_changed / longer
        gain = soft_minimum(after, self._tau) - soft_minimum(before, self._tau)
        work = float(self._rates[len(own)]) * num_changed / len(before)
        if before.min() <= 0:
            work = 0.0  # no chain serves anybody: there is nothing to lose
        return Estimate(
            weakest_before=float(before.min()),
            weakest_after=float(after.min()),
            gain=gain,
            lost_rate=0.0,  # what stays serves on
            load_s=load_s if len(target) > len(own) else 0.0,
            gain_tokens=gain * policy.lasting_s(load_s),
            cost_tokens=policy.move_s * work,
        )

    def _windows(self, may_shrink: bool) -> Iterator[tuple[Ints, Ints]]:
        """First blocks and ends: of all spans inside the present one, and of all around it."""
        own, most = self.span, self._longest
        if may_shrink:
            yield np.arange(own.start, own.end), np.arange(own.start + 1, own.end + 1)
        if most > len(own):
            yield (
                np.arange(max(0, own.end - most), own.start + 1),
                np.arange(own.end, min(len(self._cover), own.start + most) + 1),
            )

    def _weights(self, first: Ints, end: Ints) -> Floats:
        """[K, E] sum over blocks of exp(-cover / tau), but for a factor; the soft minimum falls as it rises.

        Infinite for what is no span, is too long, or leaves blocks that nobody else serves.
        """
        own, length = self.span, end[None, :] - first[:, None]
        inside = self._before[end][None, :] - self._before[first][:, None]
        faded = inside * np.exp(-self._rates[np.clip(length, 0, self._longest)] / self._tau)
        total: Floats = self._before[first][:, None] + self._behind[end][None, :] + faded
        alone = self._alone_before
        left = np.maximum(alone[first] - alone[own.start], 0)[:, None]
        left = left + np.maximum(alone[own.end] - alone[end], 0)[None, :]
        is_possible = (length > 0) & (length <= self._longest) & (left == 0)
        return np.where(is_possible, total, np.inf)

    def _cover_with(self, span: BlockSpan) -> Floats:
        cover = self._cover.copy()
        cover[span.start : span.end] += self._rates[len(span)]
        return cover


def _window(start: int, end: int) -> tuple[Ints, Ints]:
    return np.array([start]), np.array([end])
