"""What one server should do now, and why: its place on the list of moves, what it wins and what it costs.

state = read_state(view)                               # reading.py
decision = decide(state, OwnSpan(peer, span, served_s), costs, policy)
if decision.is_move: ... decision.target
span = choose_span(state.without(peer), length, throughput, policy)     # joining.py
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from petalsd.swarm.placement.plan import plan_moves
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.potential import Landscape, PlannedMove, scale, soft_minimum
from petalsd.swarm.placement.state import SwarmState
from petalsd.types import BlockSpan


class Verdict(enum.Enum):
    """MOVE       it should begin to move now
    FITS          no other blocks need it more than its own by enough to pay for the way
    WAITS         others are to move first; what is left to do after them is seen at the next check
    TOO_DEAR      the list has it, but loading is slower here: it does not pay
    SETTLING      it has moved or come a short while ago
    LOADING       the swarm sees it load blocks, or sees it serve others than it does
    """

    MOVE = "move"
    FITS = "fits"
    WAITS = "waits"
    TOO_DEAR = "too_dear"
    SETTLING = "settling"
    LOADING = "loading"


@dataclass(frozen=True, slots=True)
class OwnSpan:
    """The server that asks: its PeerID, the blocks it serves, and for how long it has."""

    peer: str
    span: BlockSpan
    served_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class MoveCosts:
    """What a move costs this server, as far as it has measured that; others are assumed to cost what Policy says.

    load_block_s  seconds to fetch and load one new block, None if not known
    margin        a move must win that many times what it costs; inf: it never pays
    """

    load_block_s: float | None = None
    margin: float = 1.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a move would do; rates in tokens/s, everybody else staying where they are.

    weakest_before  throughput of the swarm's weakest block, all announced blocks loaded
    weakest_after   the same after the move
    gain            rise of the soft minimum over blocks
    lost_rate       by how much the swarm is slower while the move lasts
    load_s          how long it lasts
    gain_tokens     what it wins while it is expected to last, and
    cost_tokens     what it costs until it is done, and until others have loaded what they announced
    """

    weakest_before: float
    weakest_after: float
    gain: float
    lost_rate: float
    load_s: float
    gain_tokens: float
    cost_tokens: float


@dataclass(frozen=True, slots=True)
class Turn:
    """A server that moves first, or at the same time: from where to where."""

    peer: str
    span: BlockSpan
    target: BlockSpan


@dataclass(frozen=True, slots=True)
class Decision:
    """``target`` is the best place for this server, its own span when there is no better one.

    ahead     the moves that come before its own, the most valuable first
    weakest   the runs of blocks that are served worst, as they are now; within a tenth of the weakest
    together  the moves of others without which its own would not pay; ``estimate`` is of all, ``load_s`` its own
    """

    verdict: Verdict
    span: BlockSpan
    target: BlockSpan
    estimate: Estimate
    ahead: tuple[Turn, ...] = ()
    weakest: tuple[BlockSpan, ...] = ()
    together: tuple[Turn, ...] = ()

    @property
    def is_move(self) -> bool:
        return self.verdict is Verdict.MOVE


def decide(state: SwarmState, own: OwnSpan, costs: MoveCosts, policy: Policy) -> Decision:
    """Whether ``own`` should move now. ValueError when it is not in ``state``."""
    row, policy = state.row_of(own.peer), policy.seen(state)
    weakest = weakest_blocks(state)
    is_seen = int(state.start[row]) == own.span.start and int(state.length[row]) == len(own.span)
    if not (state.is_free[row] and is_seen):
        verdict = Verdict.FITS if len(own.span) == state.num_blocks else Verdict.LOADING
        return Decision(verdict, own.span, own.span, _nothing(state), weakest=weakest)
    moves = plan_moves(state, policy)
    turns = [_turn(state, move) for move in moves]
    at = next((at for at, move in enumerate(moves) if move.row == row), None)
    if at is None:
        target = _best_target(state, row, policy)
        verdict = Verdict.FITS if target == own.span else Verdict.WAITS
        figures = estimate(state, row, target, costs, policy) if target != own.span else _nothing(state)
        return Decision(verdict, own.span, target, figures, tuple(turns), weakest)
    if moves[at].in_chain:
        return _in_chain(state, own, costs, policy, turns)
    figures = estimate(_after(state, turns[:at]), row, turns[at].target, costs, policy)
    verdict = own_turn(own, costs, figures, policy)
    return Decision(verdict, own.span, turns[at].target, figures, tuple(turns[:at]), weakest)


def _in_chain(
    state: SwarmState, own: OwnSpan, costs: MoveCosts, policy: Policy, chain: Sequence[Turn]
) -> Decision:
    """The others rely on ``own``: unless it never moves it goes, and reckons with what the rule expects of all."""
    target = next(turn.target for turn in chain if turn.peer == own.peer)
    load_s = estimate(state, state.row_of(own.peer), target, costs, policy).load_s
    figures = _estimate_chain(state, chain, load_s, policy)
    expected = MoveCosts(margin=costs.margin if math.isinf(costs.margin) else policy.margin)
    return Decision(
        own_turn(own, expected, figures, policy),
        own.span,
        target,
        figures,
        weakest=weakest_blocks(state),
        together=tuple(turn for turn in chain if turn.peer != own.peer),
    )


def judge(
    state: SwarmState, own: OwnSpan, target: BlockSpan, costs: MoveCosts, policy: Policy, rate: float
) -> Decision:
    """The decision to move to ``target`` whatever it is worth. ValueError when ``own`` is not in ``state``.

    ``rate``: tokens/s through each of its blocks there.
    """
    row = state.row_of(own.peer)
    figures = estimate(state, row, target, costs, policy.seen(state), rate)
    verdict = Verdict.FITS if target == own.span else Verdict.MOVE
    return Decision(verdict, own.span, target, figures, weakest=weakest_blocks(state))


def estimate(
    state: SwarmState,
    row: int,
    target: BlockSpan,
    costs: MoveCosts,
    policy: Policy,
    rate: float | None = None,
) -> Estimate:
    """What a move of server ``row`` to ``target`` would win and cost now, the others staying where they are.

    ``rate``: tokens/s through each block there; None: as it is.
    """
    own = _span(int(state.start[row]), int(state.length[row]))
    kept = own.intersect(target)
    num_new = len(target) - (0 if kept is None else len(kept))
    load_s = policy.load_s(len(target)) * num_new / len(target)
    if costs.load_block_s is not None:
        load_s = costs.load_block_s * num_new
    after = state.moved(row, target)
    if rate is not None:
        after.throughput[row] = rate
    tau = scale(state, policy)
    gain = soft_minimum(after.planned_cover(), tau) - soft_minimum(state.planned_cover(), tau)
    lost = _lost_rate(state, row, target, tau, policy)
    missed = _missed_rate(state, row, target, tau)
    work = float(state.throughput[row]) * num_new / state.num_blocks
    return Estimate(
        weakest_before=float(state.planned_cover().min()),
        weakest_after=float(after.planned_cover().min()),
        gain=gain,
        lost_rate=lost,
        load_s=load_s,
        gain_tokens=gain * policy.lasting_s(load_s),
        cost_tokens=lost * policy.leaving_share * load_s + missed * policy.pending_s + policy.move_s * work,
    )


def _estimate_chain(state: SwarmState, chain: Sequence[Turn], load_s: float, policy: Policy) -> Estimate:
    """What all moves of ``chain`` do together, at what the policy expects; ``load_s`` is the asking server's."""
    parts = []
    for turn in chain:
        row = state.row_of(turn.peer)
        parts.append(estimate(state, row, turn.target, MoveCosts(), policy))
        state = state.moved(row, turn.target)
    return Estimate(
        weakest_before=parts[0].weakest_before,
        weakest_after=parts[-1].weakest_after,
        gain=sum(part.gain for part in parts),
        lost_rate=max(part.lost_rate for part in parts),
        load_s=load_s,
        gain_tokens=sum(part.gain_tokens for part in parts),
        cost_tokens=sum(part.cost_tokens for part in parts),
    )


def _turn(state: SwarmState, move: PlannedMove) -> Turn:
    start, length = int(state.start[move.row]), int(state.length[move.row])
    return Turn(state.peers[move.row], _span(start, length), _span(move.target, length))


def _after(state: SwarmState, turns: Sequence[Turn]) -> SwarmState:
    """What they leave behind when all of them have begun."""
    for turn in turns:
        state = state.moved(state.row_of(turn.peer), turn.target)
    return state


def weakest_blocks(state: SwarmState) -> tuple[BlockSpan, ...]:
    """Runs of blocks whose throughput is within a tenth of the weakest one's."""
    now = state.served_cover()
    is_weak = np.concatenate(([False], now <= now.min() * 1.1, [False]))
    edges = np.flatnonzero(np.diff(is_weak.astype(np.int8)))
    return tuple(BlockSpan(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))


def _best_target(state: SwarmState, row: int, policy: Policy) -> BlockSpan:
    """Where server ``row`` would go if nobody else moved; its own span if no move pays."""
    values = Landscape(state, policy).values(np.array([row]))[0]
    best = int(values.argmax())
    return _span(best if values[best] > 0 else int(state.start[row]), int(state.length[row]))


def own_turn(own: OwnSpan, costs: MoveCosts, figures: Estimate, policy: Policy) -> Verdict:
    """Whether it should do now what ``figures`` tell of, there being nobody before it."""
    if own.served_s < policy.min_stay_s and figures.weakest_before > 0:
        return Verdict.SETTLING
    if math.isinf(costs.margin) or figures.gain_tokens <= costs.margin * figures.cost_tokens:
        return Verdict.TOO_DEAR
    return Verdict.MOVE


def _lost_rate(state: SwarmState, row: int, target: BlockSpan, tau: float, policy: Policy) -> float:
    """As ``Landscape.losses``, of one move."""
    served, left = state.served_cover(), state.moved(row, target).served_cover()
    lowest = float(served.min())
    if lowest <= 0:
        return 0.0  # no chain serves anybody: there is nothing to lose
    if float(left.min()) <= 0:
        return policy.hole_weight * lowest
    return min(soft_minimum(served, tau) - soft_minimum(left, tau), lowest)


def _missed_rate(state: SwarmState, row: int, target: BlockSpan, tau: float) -> float:
    """By how much the swarm is slower after the move while others still load what they announced."""
    served, rate = state.served_cover(), state.throughput[row]
    if np.array_equal(served, state.planned_cover()):
        return 0.0
    after = served.copy()
    after[state.served_start[row] : state.served_end[row]] -= rate
    after[target.start : target.end] += rate
    return max(soft_minimum(served, tau) - soft_minimum(after, tau), 0.0)


def _nothing(state: SwarmState) -> Estimate:
    weakest = float(state.planned_cover().min())
    return Estimate(weakest, weakest, 0.0, 0.0, 0.0, 0.0, 0.0)


def _span(start: int, length: int) -> BlockSpan:
    return BlockSpan(start, start + length)
