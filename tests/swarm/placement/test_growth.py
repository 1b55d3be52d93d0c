"""The order in which a server loads its blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from petalsd.swarm.placement.growth import loading_order
from petalsd.swarm.placement.policy import Policy
from petalsd.types import BlockSpan
from tests.swarm.placement.swarms import loading, random_state, state_of

POLICY = Policy(load_base_s=0.0, load_block_s=10.0)


def test_it_begins_where_others_serve_least_and_grows_to_the_weaker_side() -> None:
    """Block 5 has nobody, 4 has less than 6; what the server itself is seen to serve says nothing."""
    state = state_of(8, (0, 8, 9.0), (0, 5, 1.0), (4, 5, 1.0), (6, 8, 3.0))
    assert loading_order(state, "a", BlockSpan(3, 8), None, POLICY) == [5, 4, 3, 6, 7]


def test_what_is_there_comes_first() -> None:
    state = state_of(8, (0, 2, 5.0), (2, 4, 1.0), (4, 6, 1.0), (6, 8, 2.0))
    assert loading_order(state, "c", BlockSpan(1, 8), BlockSpan(4, 6), POLICY) == [4, 5, 3, 2, 6, 7, 1]


def test_blocks_that_others_only_load_are_needed() -> None:
    """It will take them a while, and until then nobody serves: a takes longest to block 5, so that comes first."""
    state = loading(state_of(6, (3, 6, 5.0), (0, 3, 1.0)), 1)
    assert loading_order(state, "z", BlockSpan(0, 6), None, POLICY) == [5, 4, 3, 2, 1, 0]


def test_several_fill_a_gap_from_both_ends() -> None:
    """Server a has come from the left and serves block 2 of what it goes for; b begins where a will be last."""
    state = loading(state_of(8, (2, 6, 5.0), (2, 6, 5.0), (0, 2, 9.0), (6, 8, 9.0)), 2)
    state.served_end[0] = 3
    assert loading_order(state, "b", BlockSpan(2, 6), None, POLICY) == [5, 4, 3, 2]
    assert loading_order(state, "a", BlockSpan(2, 6), BlockSpan(2, 3), POLICY) == [2, 3, 4, 5]


def test_what_is_soon_left_does_not_count() -> None:
    """Server a still serves 0:2 while it fetches the first of 2:4: blocks 0 and 1 will have nobody else."""
    state = state_of(6, (0, 2, 5.0), (2, 6, 1.0))
    state.start[0] = 2
    state = replace(state, served_start=np.array([0, 2]), served_end=np.array([2, 6]))
    assert loading_order(state, "z", BlockSpan(0, 4), None, POLICY)[:2] == [0, 1]


def test_in_an_empty_swarm_it_goes_from_the_first_to_the_last() -> None:
    assert loading_order(random_state(0, servers=0), "z", BlockSpan(2, 6), None, POLICY) == [2, 3, 4, 5]


@pytest.mark.parametrize("seed", range(5))
def test_all_beginnings_are_consecutive(seed: int) -> None:
    goal = BlockSpan(3, 14)
    order = loading_order(random_state(seed), "003", goal, None, POLICY)
    assert sorted(order) == list(goal)
    assert all(max(order[:n]) - min(order[:n]) == n - 1 for n in range(1, len(order)))
