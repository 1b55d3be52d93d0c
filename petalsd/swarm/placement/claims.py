"""Newcomers that chose at the same moment, before they could see each other: who keeps its blocks, and who not.

Each announces what it chose and reads the directory again. Where several have chosen what one is enough for, all
but one choose anew, those with the highest PeerIDs first, each knowing where those before it go: every newcomer
derives the same from the same view.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from petalsd.swarm.directory import SwarmView
from petalsd.swarm.placement.joining import worths
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.potential import scale
from petalsd.swarm.placement.reading import is_ours
from petalsd.swarm.placement.state import Floats, SwarmState
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan

_GOOD_ENOUGH = 0.9  # of the best place's worth: rates change a little all the time, and that is no dispute


@dataclass(frozen=True, slots=True)
class Review:
    """What a newcomer that claims a span sees.

    alone   the best place if everybody else stays; the claim itself where that is good enough
    target  the same, once those who are to choose anew before it have done so
    """

    claim: BlockSpan
    alone: BlockSpan
    target: BlockSpan

    @property
    def is_undisputed(self) -> bool:
        return self.claim == self.alone


def newcomers(view: SwarmView) -> frozenset[str]:
    """Servers that follow this rule and load all that they announce."""
    states: dict[str, set[ServerState]] = {}
    for records in view.blocks:
        for peer, record in records.items():
            if is_ours(record) and record.state is not ServerState.OFFLINE:
                states.setdefault(peer, set()).add(record.state)
    return frozenset(peer for peer, its in states.items() if its == {ServerState.JOINING})


def review(state: SwarmState, coming: Collection[str], peer: str, policy: Policy) -> Review:
    """What the claim of ``peer`` is worth among those of ``coming``. ValueError when it is not in ``state``."""
    own, tau = state.row_of(peer), scale(state, policy)
    claim = _span(state, own, int(state.start[own]))
    cover = state.planned_cover()
    alone = _best(cover, state, own, tau)
    rows = [row for row, one in enumerate(state.peers) if one in coming and one > peer]
    for row in reversed(rows):
        best = _best(cover, state, row, tau)
        _add(cover, _span(state, row, int(state.start[row])), -float(state.throughput[row]))
        _add(cover, best, float(state.throughput[row]))
    return Review(claim, alone, _best(cover, state, own, tau))


def _best(cover: Floats, state: SwarmState, row: int, tau: float) -> BlockSpan:
    """Where the server of ``row``, which ``cover`` has at its claim, is needed most; the claim where that does."""
    start, length = int(state.start[row]), int(state.length[row])
    others = cover.copy()
    _add(others, _span(state, row, start), -float(state.throughput[row]))
    worth = worths(np.maximum(others, 0.0), length, tau)
    if worth[start] >= _GOOD_ENOUGH * worth.max():
        return _span(state, row, start)
    return _span(state, row, int(np.flatnonzero(worth >= worth.max() * (1 - 1e-9))[0]))


def _add(cover: Floats, span: BlockSpan, rate: float) -> None:
    cover[span.start : span.end] += rate


def _span(state: SwarmState, row: int, start: int) -> BlockSpan:
    return BlockSpan(start, start + int(state.length[row]))
