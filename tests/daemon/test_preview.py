"""The figures of a rebalance that has not happened."""

from __future__ import annotations

import pytest

from petalsd.daemon.preview import Preview, preview
from petalsd.swarm.directory import SwarmView
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan
from tests.daemon.fakes import NUM_BLOCKS, OTHER, PEER, FakeSwarm


def view_of(*servers: tuple[str, BlockSpan, float]) -> SwarmView:
    swarm = FakeSwarm()
    for peer, span, throughput in servers:
        swarm.put(peer, ServerState.ONLINE, span, throughput)
    return SwarmView("prefix", NUM_BLOCKS, swarm.blocks)


def test_a_gap_is_where_a_server_is_needed_most() -> None:
    """Two servers on the same half: the move makes a chain out of none."""
    view = view_of((PEER, BlockSpan(0, 4), 10.0), (OTHER, BlockSpan(0, 4), 7.0))
    assert preview(view, PEER, BlockSpan(0, 4), None) == Preview(BlockSpan(0, 4), BlockSpan(4, 8), 0.0, 7.0)


def test_a_named_target_is_taken_although_it_is_worse() -> None:
    view = view_of((PEER, BlockSpan(0, 4), 10.0), (OTHER, BlockSpan(4, 8), 7.0))
    planned = preview(view, PEER, BlockSpan(0, 4), BlockSpan(2, 6))
    assert (planned.before, planned.after) == (7.0, 0.0)
    assert (planned.blocks_to_load, planned.blocks_kept) == (2, 2)


def test_the_best_place_may_be_the_one_it_has() -> None:
    view = view_of((PEER, BlockSpan(0, 4), 10.0), (OTHER, BlockSpan(4, 8), 7.0))
    planned = preview(view, PEER, BlockSpan(0, 4), None)
    assert planned.proposed == planned.current
    assert (planned.blocks_to_load, planned.blocks_kept) == (0, 4)
    assert planned.after == pytest.approx(planned.before)
