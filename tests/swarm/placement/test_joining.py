"""Where a newcomer goes, and how a reading of the directory becomes a state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from petalsd.swarm.directory import SwarmView
from petalsd.swarm.placement.joining import choose_span
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.reading import read_state, without_settling
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan
from tests.swarm.placement.swarms import random_state, state_of


def test_a_newcomer_fills_the_gap() -> None:
    state = state_of(8, (0, 4, 1.0), (6, 8, 1.0))
    assert choose_span(state, 2, 1.0, Policy()) == BlockSpan(4, 6)


def test_ties_go_to_the_lowest_block() -> None:
    """The first of a swarm begins at its first block."""
    assert choose_span(state_of(6, (0, 6, 1.0)), 2, 1.0, Policy()) == BlockSpan(0, 2)
    assert choose_span(random_state(0, servers=0), 3, 1.0, Policy()) == BlockSpan(0, 3)


def test_more_blocks_than_the_model_has_cannot_be_placed() -> None:
    with pytest.raises(ValueError, match="4 blocks among 3"):
        choose_span(state_of(3, (0, 3, 1.0)), 4, 1.0, Policy())


def view_of(num_blocks: int, *records: tuple[str, BlockSpan, ServerRecord]) -> SwarmView:
    blocks: list[dict[str, ServerRecord]] = [{} for _ in range(num_blocks)]
    for peer, span, record in records:
        for block in span:
            blocks[block][peer] = record
    return SwarmView("prefix", num_blocks, blocks)


def record(state: ServerState, span: BlockSpan, version: str | None = "petalsd 1") -> ServerRecord:
    return ServerRecord(state, 2.0, span=span, version=version)


@pytest.mark.parametrize("rate", [1e30, 1.7e308])
@pytest.mark.parametrize(
    ("span", "gap"), [(BlockSpan(0, 1), BlockSpan(4, 6)), (BlockSpan(0, 6), BlockSpan(6, 8))]
)
def test_absurd_throughputs_hide_nobody(rate: float, span: BlockSpan, gap: BlockSpan) -> None:
    """Sums with them lost what the others serve, or became NaN, for which there is no best place."""
    liars = [(peer, span, ServerRecord(ServerState.ONLINE, rate, span=span)) for peer in ("a", "b", "c")]
    honest = ("d", BlockSpan(1, 4), record(ServerState.ONLINE, BlockSpan(1, 4)))
    state = read_state(view_of(8, honest, *liars))
    alone = read_state(view_of(8, *liars))
    assert (state.planned_cover() - alone.planned_cover()).round(3).tolist() == [0, 2, 2, 2, 0, 0, 0, 0]
    assert choose_span(state, 2, 2.0, Policy()) == gap
    assert np.isfinite(state.mean_cover())


def test_a_server_that_moves_counts_with_what_it_serves_and_what_it_loads() -> None:
    """From 0:4 to 2:6: planned with the latter from the beginning, and not to be moved again yet."""
    arriving = ("a", BlockSpan(4, 6), record(ServerState.JOINING, BlockSpan(2, 6)))
    fetching = view_of(8, ("a", BlockSpan(0, 4), record(ServerState.ONLINE, BlockSpan(0, 4))), arriving)
    leaving = view_of(
        8,
        ("a", BlockSpan(0, 2), record(ServerState.OFFLINE, BlockSpan(0, 2))),
        ("a", BlockSpan(2, 4), record(ServerState.ONLINE, BlockSpan(2, 4))),
        arriving,
    )
    for view, served in ((fetching, [2, 2, 2, 2, 0, 0, 0, 0]), (leaving, [0, 0, 2, 2, 0, 0, 0, 0])):
        state = read_state(view)
        assert state.planned_cover().tolist() == [0, 0, 2, 2, 2, 2, 0, 0]
        assert state.served_cover().tolist() == served
        assert not state.is_free[0]


def test_who_is_free() -> None:
    """Those that follow this rule, serve what they announce, and do not serve everything anyway."""
    whole, half = BlockSpan(0, 8), BlockSpan(0, 4)
    view = view_of(
        8,
        ("a", half, record(ServerState.ONLINE, half)),
        ("b", half, record(ServerState.ONLINE, half, "2.3.0")),
        ("c", half, record(ServerState.ONLINE, half, None)),
        ("d", half, record(ServerState.JOINING, half)),
        ("e", whole, record(ServerState.ONLINE, whole)),
    )
    state = read_state(view)
    assert state.peers == ["a", "b", "c", "d", "e"]
    assert state.is_free.tolist() == [True, False, False, False, False]
    assert state.planned_cover()[0] == 10.0 and state.served_cover()[0] == 8.0


def test_who_came_a_short_while_ago_is_not_free() -> None:
    """No turn is kept for it, as it would not go; all are free where a block has nobody. We know our own time."""
    span = BlockSpan(0, 4)
    fresh = replace(record(ServerState.ONLINE, span), online_since=1000.0)
    servers = [("a", span, fresh), ("b", span, replace(fresh, online_since=930.0)), ("c", span, fresh)]
    for num_blocks, free in (4, [False, True, True]), (5, [True, True, True]):
        view = view_of(num_blocks, *servers)
        state = replace(read_state(view), is_free=np.ones(3, bool))
        assert without_settling(state, view, came_after=940.0, own="c").is_free.tolist() == free


def test_an_empty_swarm_is_a_state() -> None:
    """The first server of a model reads nothing at all."""
    state = read_state(view_of(4))
    assert state.planned_cover().tolist() == [0.0] * 4 and state.mean_cover() == 0.0
