"""The figures of all possible moves at once, against the same figures worked out move by move."""

from __future__ import annotations

import numpy as np
import pytest

from petalsd.swarm.placement.decision import MoveCosts, estimate
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.potential import Landscape, soft_minimum
from petalsd.swarm.placement.state import cover
from petalsd.types import BlockSpan
from tests.swarm.placement.swarms import loading, random_state, state_of


def test_the_soft_minimum_is_below_the_minimum_and_near_it() -> None:
    """Two equal weakest blocks are worse than one; far stronger blocks do not count."""
    one, two = np.array([1.0, 9.0, 9.0]), np.array([1.0, 1.0, 9.0])
    assert soft_minimum(one, 0.1) == pytest.approx(1.0)
    assert soft_minimum(two, 0.1) == pytest.approx(1.0 - 0.1 * np.log(2))


def test_a_block_that_nobody_serves_has_exactly_nothing() -> None:
    """Sums of differences would leave rounding behind, and a hole must not look served."""
    spans = np.array([[0, 3, 0.1], [1, 3, 0.2], [4, 5, 0.7]])
    start, end = spans[:, 0].astype(int), spans[:, 1].astype(int)
    assert cover(5, start, end, spans[:, 2]).tolist() == pytest.approx([0.1, 0.3, 0.3, 0.0, 0.7])
    assert cover(5, start, end, spans[:, 2])[3] == 0.0


@pytest.mark.parametrize("num_loading", [0, 6])
@pytest.mark.parametrize("seed", range(3))
def test_the_table_of_moves_agrees_with_each_move(seed: int, num_loading: int) -> None:
    """Gain, loss and value of every move of every server are what the state after the move says."""
    state, policy = loading(random_state(seed), num_loading), Policy()
    land, rows = Landscape(state, policy), np.arange(num_loading, len(state.peers))
    gains, losses, values = land.gains(rows), land.losses(rows), land.values(rows)
    for at, row in enumerate(rows.tolist()):
        length = int(state.length[row])
        assert np.isneginf(gains[at, state.num_blocks - length + 1 :]).all()
        for start in range(state.num_blocks - length + 1):
            figures = estimate(state, row, BlockSpan(start, start + length), MoveCosts(), policy)
            assert gains[at, start] == pytest.approx(figures.gain, abs=1e-8)
            assert losses[at, start] == pytest.approx(figures.lost_rate, abs=1e-6)
            net = figures.gain_tokens - policy.margin * figures.cost_tokens
            assert values[at, start] == pytest.approx(net, abs=1e-4)


def test_planned_moves_change_the_ground() -> None:
    """After a move the landscape is that of the moved state."""
    state, policy = random_state(7), Policy()
    land = Landscape(state, policy)
    target = 0 if state.start[3] else 1
    land.move(3, target)
    moved = state.moved(3, BlockSpan(target, target + int(state.length[3])))
    assert land.cover == pytest.approx(moved.planned_cover())
    assert land.served == pytest.approx(moved.served_cover())


def test_leaving_a_hole_costs_all_that_is_served() -> None:
    """The only holder of a block takes the whole throughput with it while it loads."""
    state = state_of(4, (0, 2, 3.0), (1, 4, 5.0), (2, 4, 1.0))
    lost = Landscape(state, Policy(hole_weight=2.0)).losses(np.array([0]))[0]
    assert lost[:3].tolist() == pytest.approx([0.0, 2.0 * 3.0, 2.0 * 3.0])
