"""What one server decides, and what it says about it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from petalsd.swarm.placement.decision import (
    Decision,
    MoveCosts,
    OwnSpan,
    Verdict,
    decide,
    judge,
    weakest_blocks,
)
from petalsd.swarm.placement.plan import plan_moves
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.state import SwarmState
from petalsd.types import BlockSpan
from tests.swarm.placement.swarms import loading, random_state, state_of


def asked(state: SwarmState, peer: str, costs: MoveCosts | None = None, served_s: float = 1e9) -> Decision:
    row = state.row_of(peer)
    span = BlockSpan(int(state.start[row]), int(state.start[row] + state.length[row]))
    return decide(state, OwnSpan(peer, span, served_s), costs or MoveCosts(), Policy())


def test_one_of_a_crowd_moves_into_a_gap() -> None:
    """Two servers on the same half: one goes, the other waits for it, and both tell why."""
    state = state_of(8, (0, 4, 10.0), (0, 4, 10.0))
    goes, stays = asked(state, "a"), asked(state, "b")
    assert goes.is_move and goes.target == BlockSpan(4, 8) and goes.ahead == ()
    assert (goes.estimate.weakest_before, goes.estimate.weakest_after) == (0.0, 10.0)
    assert goes.weakest == (BlockSpan(4, 8),)
    assert stays.verdict is Verdict.WAITS
    assert [(turn.peer, turn.target) for turn in stays.ahead] == [("a", BlockSpan(4, 8))]


def test_the_list_is_the_same_for_all() -> None:
    """Exactly the servers on the list move, each to the place that the list has for it."""
    state = random_state(3)
    listed = {move.row: move.target for move in plan_moves(state, Policy())}
    moving = {
        row: d.target.start for row, peer in enumerate(state.peers) if (d := asked(state, peer)).is_move
    }
    assert 0 < len(listed) < len(state.peers)
    assert moving.items() <= listed.items()


@pytest.mark.parametrize("seed", range(5))
def test_turns_lead_to_rest(seed: int) -> None:
    """If all on the list move, and so on, nobody wants to move in the end, and it was worth it."""
    state = random_state(seed)
    before = float(state.planned_cover().min())
    for _ in range(60):
        moves = plan_moves(state, Policy())
        if not moves:
            break
        for move in moves:
            state = state.moved(move.row, BlockSpan(move.target, move.target + int(state.length[move.row])))
        state = dataclasses.replace(
            state,
            served_start=state.start,
            served_end=state.start + state.length,
            is_free=np.ones(len(state.peers), bool),
        )
    assert plan_moves(state, Policy()) == []
    assert float(state.planned_cover().min()) > before


def test_a_gain_counts_for_longer_while_nobody_loads() -> None:
    """So a move that does not pay for its way may do so once the last one has come; for all figures alike."""
    rates = [(0, 4, 10.0), (0, 4, 10.0), (4, 8, 10.0), (4, 8, 10.0), (0, 8, 1.0)]
    settled = state_of(8, *rates)
    coming = dataclasses.replace(settled, served_end=np.array([4, 4, 8, 8, 7]))
    assert settled.is_settled and not coming.is_settled
    policy = Policy(horizon_s=100.0, settled_horizon_s=300.0)
    assert policy.seen(coming) is policy
    assert policy.seen(settled).horizon_s == 300.0 == policy.seen(settled).seen(settled).horizon_s

    gap = state_of(8, (0, 4, 10.0), (0, 4, 10.0))
    tokens = [
        decide(gap, OwnSpan("a", BlockSpan(0, 4)), MoveCosts(), Policy(settled_horizon_s=horizon_s)).estimate
        for horizon_s in (100.0, 200.0)
    ]
    assert tokens[1].gain_tokens > 1.5 * tokens[0].gain_tokens
    assert tokens[1].cost_tokens == tokens[0].cost_tokens


def test_blocks_are_not_left_before_those_that_come_there_have_loaded() -> None:
    """The crowd on the left half thins out for a small gap only when the newcomer there is up."""
    spans = [(0, 4, 6.0), (0, 4, 2.0), (0, 4, 3.0), (4, 8, 8.0)]
    state = state_of(8, *spans)
    assert asked(state, "b").is_move
    coming = loading(state, 1)
    assert coming.planned_cover().tolist() == state.planned_cover().tolist()
    assert not asked(coming, "b").is_move


def test_the_only_holder_of_blocks_stays() -> None:
    """Leaving would end every session of the swarm."""
    state = state_of(4, (0, 2, 1.0), (2, 4, 9.0), (2, 4, 9.0))
    assert not asked(state, "a").is_move
    assert asked(state, "a").verdict is Verdict.FITS


def test_a_balanced_swarm_is_at_rest() -> None:
    state = state_of(4, (0, 2, 1.0), (0, 2, 1.0), (2, 4, 1.0), (2, 4, 1.0))
    assert {asked(state, peer).verdict for peer in "abcd"} == {Verdict.FITS}


def test_slow_loading_makes_a_move_too_dear() -> None:
    """The list assumes what is usual; who knows that its own move costs far more does not go."""
    state = state_of(4, (0, 2, 5.0), (0, 2, 5.0), (0, 2, 5.0), (2, 4, 2.0), (2, 4, 1.0))
    mover = next(peer for peer in state.peers if asked(state, peer).is_move)
    assert asked(state, mover, MoveCosts(load_block_s=1.0)).is_move
    dear = asked(state, mover, MoveCosts(load_block_s=1e7))
    assert dear.verdict is Verdict.TOO_DEAR
    assert dear.estimate.cost_tokens > dear.estimate.gain_tokens
    assert asked(state, mover, MoveCosts(margin=float("inf"))).verdict is Verdict.TOO_DEAR


def test_a_newcomer_stays_for_a_while_unless_nobody_is_served() -> None:
    """Two moves in a row are for emergencies."""
    state = state_of(4, (0, 2, 5.0), (0, 2, 5.0), (0, 2, 5.0), (2, 4, 2.0), (2, 4, 1.0))
    mover = next(peer for peer in state.peers if asked(state, peer).is_move)
    assert asked(state, mover, served_s=1.0).verdict is Verdict.SETTLING
    assert asked(state_of(8, (0, 4, 10.0), (0, 4, 10.0)), "a", served_s=1.0).is_move


def test_who_is_not_seen_where_it_is_does_not_judge() -> None:
    """The directory is late: a decision from it would be about another swarm."""
    state = state_of(8, (0, 4, 10.0), (0, 4, 10.0))
    late = decide(state, OwnSpan("a", BlockSpan(2, 6)), MoveCosts(), Policy())
    assert late.verdict is Verdict.LOADING and late.target == BlockSpan(2, 6)
    with pytest.raises(ValueError, match="z has no span"):
        decide(state, OwnSpan("z", BlockSpan(0, 4)), MoveCosts(), Policy())


def test_a_server_of_all_blocks_has_no_choice() -> None:
    state = dataclasses.replace(state_of(4, (0, 4, 1.0)), is_free=np.array([False]))
    assert asked(state, "a").verdict is Verdict.FITS


def test_servers_that_follow_another_rule_are_not_counted_on() -> None:
    """Stock Petals servers stay where they are in the plan, and nobody waits for them."""
    state = dataclasses.replace(state_of(8, (0, 4, 10.0), (0, 4, 10.0)), is_free=np.array([False, True]))
    assert asked(state, "b").is_move


def test_a_target_that_was_asked_for_is_judged_and_taken() -> None:
    """Even where it makes things worse; the figures say so."""
    state = state_of(8, (0, 4, 10.0), (4, 8, 7.0))
    decision = judge(state, OwnSpan("a", BlockSpan(0, 4)), BlockSpan(2, 6), MoveCosts(), Policy(), rate=10.0)
    assert decision.is_move
    assert (decision.estimate.weakest_before, decision.estimate.weakest_after) == (7.0, 0.0)
    assert decision.estimate.gain < 0 < decision.estimate.lost_rate


def test_the_weakest_runs_of_blocks() -> None:
    state = state_of(6, (0, 2, 1.0), (2, 4, 5.0), (4, 6, 1.05))
    assert weakest_blocks(state) == (BlockSpan(0, 2), BlockSpan(4, 6))


@pytest.mark.parametrize("seed", range(3))
def test_nobody_is_on_the_list_twice(seed: int) -> None:
    """Also where there are fewer servers than moves that may begin."""
    rows = [move.row for move in plan_moves(random_state(seed, servers=3), Policy(min_moves=8))]
    assert len(rows) == len(set(rows))
