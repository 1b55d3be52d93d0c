"""Who serves which blocks of a model, as the control socket says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from petalsd.status import PeerEntry, PeerState, Span
from petalsd.swarm.directory import RemoteSpan, SwarmView
from petalsd.swarm.protocol import ServerState


def peer_entries(view: SwarmView, pings: Mapping[str, float], own_peer: str | None) -> list[PeerEntry]:
    """The servers that are online or on the way; ``pings`` in seconds."""
    remotes = view.spans(ServerState.JOINING)
    return [_entry(one, view, pings.get(one.peer), is_self=one.peer == own_peer) for one in remotes]


def uncovered(view: SwarmView) -> list[Span]:
    """Runs of blocks that no ONLINE server has."""
    runs: list[list[int]] = []
    for block in view.missing_blocks():
        if runs and runs[-1][1] == block:
            runs[-1][1] = block + 1
        else:
            runs.append([block, block + 1])
    return [Span(start=start, end=end) for start, end in runs]


def _entry(remote: RemoteSpan, view: SwarmView, ping_s: float | None, *, is_self: bool) -> PeerEntry:
    record = remote.record
    return PeerEntry(
        peer_id=remote.peer,
        state=cast(PeerState, remote.state.name.lower()),
        span=Span.of(remote.span),
        throughput=record.throughput,
        inference_rps=record.inference_rps,
        forward_rps=record.forward_rps,
        network_rps=record.network_rps,
        cache_tokens_left=record.cache_tokens_left,
        public_name=record.public_name,
        version=record.version,
        is_relayed=bool(record.using_relay),
        ping_ms=None if ping_s is None or not math.isfinite(ping_s) else round(ping_s * 1e3, 3),
        is_self=is_self,
        is_ghost=remote.peer in view.ghosts,
    )
