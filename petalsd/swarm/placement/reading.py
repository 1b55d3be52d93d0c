"""Turns a reading of the directory into the state that placement works on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from petalsd.swarm.directory import RemoteSpan, SwarmView
from petalsd.swarm.placement.state import SwarmState
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan

_OURS = "petalsd"  # how its version begins
# tokens/s. Anybody may announce more; in sums with that what others serve is lost, and no place is the best.
_MAX_RATE = 1e9


def read_state(view: SwarmView) -> SwarmState:
    """The servers of ``view`` that serve or load blocks.

    A server that moves has ONLINE records for what it still serves, and JOINING ones for the new blocks, which
    claim all the blocks that it will have: it counts with the latter where the cover is planned, and with the
    former where it is served.
    """
    served = {remote.peer: remote for remote in view.spans(ServerState.ONLINE)}
    loading = _loading(view)
    peers = sorted({*served, *loading})
    spans = [loading[peer][0] if peer in loading else served[peer].span for peer in peers]
    now = [served[peer].span if peer in served else None for peer in peers]
    rates = [served[peer].record.throughput if peer in served else loading[peer][1] for peer in peers]
    free = [
        peer in served
        and peer not in loading
        and is_ours(served[peer].record)
        and len(span) < view.num_blocks
        for peer, span in zip(peers, spans, strict=True)
    ]
    return SwarmState(
        num_blocks=view.num_blocks,
        peers=peers,
        start=np.array([span.start for span in spans], np.int64),
        length=np.array([len(span) for span in spans], np.int64),
        served_start=np.array([0 if span is None else span.start for span in now], np.int64),
        served_end=np.array([0 if span is None else span.end for span in now], np.int64),
        throughput=np.minimum(np.array(rates, np.float64), _MAX_RATE),
        is_free=np.array(free, bool),
        is_pledged=np.array([_is_pledged(served.get(peer)) for peer in peers], bool),
    )


def without_settling(state: SwarmState, view: SwarmView, came_after: float, own: str) -> SwarmState:
    """Servers that came to their blocks after that (Unix seconds) are not free to move, as they will not.

    All are where a block has nobody. ``own`` knows better when it came.
    """
    if state.planned_cover().min() <= 0:
        return state
    settling = [
        peer != own and is_free and _came_at(view, peer, int(start)) > came_after
        for peer, start, is_free in zip(state.peers, state.start, state.is_free, strict=True)
    ]
    return replace(state, is_free=state.is_free & ~np.array(settling, bool))


def _came_at(view: SwarmView, peer: str, block: int) -> float:
    record = view.blocks[block].get(peer)
    return 0.0 if record is None else record.online_since or 0.0


def is_ours(record: ServerRecord) -> bool:
    """Whether the server that wrote it follows this rule."""
    return (record.version or "").startswith(_OURS)


def _is_pledged(remote: RemoteSpan | None) -> bool:
    """Servers that are pinned, never move or serve a fixed number of blocks do not say how many they may serve."""
    return remote is not None and remote.record.max_blocks is not None


def _loading(view: SwarmView) -> dict[str, tuple[BlockSpan, float]]:
    """What each server announces as JOINING, and its throughput."""
    spans: dict[str, tuple[BlockSpan, float]] = {}
    whole = BlockSpan(0, view.num_blocks)
    for block, records in enumerate(view.blocks):
        for peer, record in records.items():
            if record.state is not ServerState.JOINING:
                continue
            claim = None if record.span is None else record.span.intersect(whole)
            known = spans.get(peer)
            span = claim or BlockSpan(block, block + 1)
            spans[peer] = (span if known is None else known[0].hull(span), record.throughput)
    return spans
