"""Moves that pay only together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from petalsd.swarm.directory import SwarmView
from petalsd.swarm.placement.decision import Decision, MoveCosts, OwnSpan, Verdict, decide
from petalsd.swarm.placement.plan import plan_moves
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.potential import soft_minimum
from petalsd.swarm.placement.reading import read_state
from petalsd.swarm.placement.state import SwarmState
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan
from tests.swarm.placement.swarms import random_state, state_of

ALONE = Policy(chain_servers=0)  # moves that pay by themselves only


def row_of_three(last: float = 0.0) -> SwarmState:
    """Block 1 is served twice; block 5 by ``last`` alone, and no single move to it leaves less of a gap."""
    spans = [(0, 2, 10.0), (1, 3, 10.0), (3, 5, 10.0)]
    return state_of(6, *spans, *([(5, 6, last)] if last else []))


def asked(state: SwarmState, peer: str, costs: MoveCosts | None = None) -> Decision:
    row = state.row_of(peer)
    span = BlockSpan(int(state.start[row]), int(state.start[row] + state.length[row]))
    return decide(state, OwnSpan(peer, span), costs or MoveCosts(margin=4 / 3), Policy())


def after(state: SwarmState, policy: Policy) -> SwarmState:
    """All moves of the list made, and all loaded."""
    for move in plan_moves(state, policy):
        state = state.moved(move.row, BlockSpan(move.target, move.target + int(state.length[move.row])))
    return replace(state, served_start=state.start, served_end=state.start + state.length)


def test_a_gap_is_closed_by_a_row_of_servers() -> None:
    """One takes the block that nobody has, another the one that this leaves; the rest waits."""
    state = row_of_three()
    assert plan_moves(state, ALONE) == []
    first, second, third = asked(state, "c"), asked(state, "b"), asked(state, "a")
    assert (first.verdict, first.target, first.ahead) == (Verdict.MOVE, BlockSpan(4, 6), ())
    assert (second.verdict, second.target) == (Verdict.MOVE, BlockSpan(2, 4))
    assert [[turn.peer for turn in one.together] for one in (first, second)] == [["b"], ["c"]]
    assert [turn.peer for turn in third.ahead] == ["c", "b"] and not third.is_move
    assert after(state, Policy()).planned_cover().min() == 10.0


def test_its_figures_are_those_of_all_its_moves() -> None:
    """What is said of a chain is what it is listed for."""
    state, policy = row_of_three(last=1.0), Policy()
    for peer in "cb":
        figures = asked(state, peer).estimate
        assert (figures.weakest_before, figures.weakest_after) == (1.0, 10.0)
        won = figures.gain_tokens - policy.margin * figures.cost_tokens
        assert won == pytest.approx(sum(move.value for move in plan_moves(state, policy)))


def test_the_others_rely_on_each() -> None:
    """Who loads slowly goes all the same; who never moves does not, says so, and is in no chain."""
    state = row_of_three(last=8.0)
    slow, never = MoveCosts(load_block_s=1e4, margin=10.0), MoveCosts(margin=float("inf"))
    assert asked(state, "c", slow).is_move and asked(state, "c", slow).estimate.load_s == 1e4
    assert asked(state, "c", never).verdict is Verdict.TOO_DEAR
    assert plan_moves(replace(state, is_pledged=np.array([True, True, False, True])), Policy()) == []


def test_records_tell_who_can_be_relied_on() -> None:
    """Whoever leaves to the rule how many blocks it serves leaves it the place, too."""
    record = ServerRecord(ServerState.ONLINE, 1.0, BlockSpan(0, 2), version="petalsd 1", max_blocks=2)
    records = {"Qa": record, "Qb": replace(record, max_blocks=None)}
    assert read_state(SwarmView("tiny", 4, [records, records, {}, {}])).is_pledged.tolist() == [True, False]


def test_it_is_made_instead_of_single_moves_that_win_less() -> None:
    """A slow server that nobody needs where it is could help at once; the chain makes it needless."""
    state = state_of(6, (0, 2, 10.0), (1, 3, 10.0), (3, 5, 10.0), (5, 6, 1.0), (0, 1, 2.0))
    alone, together = plan_moves(state, ALONE), plan_moves(state, Policy())
    assert [(move.row, move.target) for move in alone] == [(4, 5)]
    assert [(move.row, move.target) for move in together] == [(2, 4), (1, 2)]
    assert sum(move.value for move in together) > alone[0].value > 0


def test_none_is_begun_while_others_load_unless_a_block_has_nobody() -> None:
    """The first server has one of its blocks yet to come; nobody waits for it where no chain serves anybody."""
    for last, listed in ((1.0, []), (0.0, [2, 1])):
        state = row_of_three(last)
        is_there = np.arange(len(state.peers)) > 0
        state = replace(state, served_end=state.served_end - ~is_there, is_free=is_there)
        assert [move.row for move in plan_moves(state, Policy())] == listed


@pytest.mark.parametrize(("seed", "servers", "num_blocks"), [(3, 10, 40), (1, 12, 40), (5, 20, 60)])
def test_it_makes_a_swarm_at_rest_better(seed: int, servers: int, num_blocks: int) -> None:
    """From where no single move pays; each of the moves is of another server."""
    state = random_state(seed, servers, num_blocks)
    while plan_moves(state, ALONE):
        state = after(state, ALONE)
    moves, better, tau = plan_moves(state, Policy()), after(state, Policy()), 0.02 * state.mean_cover()
    assert 2 <= len({move.row for move in moves}) == len(moves) <= 5 and all(move.in_chain for move in moves)
    assert soft_minimum(better.planned_cover(), tau) > soft_minimum(state.planned_cover(), tau)


def test_large_swarms_look_for_none() -> None:
    state = row_of_three()
    assert plan_moves(state, Policy(chain_servers=2)) == []
