"""Where a server should stand: pure functions of a reading of the directory (protocol.md 6.3).

Every server of a swarm must come to the same sums, so throughputs are added in order of PeerID and ties go
to the lowest block.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from petalsd.swarm.directory import RemoteSpan
from petalsd.types import BlockSpan

_EPS = 1e-3
# The reference has no bound; real swarms settle in a few rounds, and a hostile record must not hang us.
_MAX_ROUNDS = 100


@dataclass(slots=True)
class _Placed:
    start: int
    length: int
    throughput: float

    @property
    def blocks(self) -> range:
        return range(self.start, self.start + self.length)


def block_throughputs(spans: Sequence[RemoteSpan], num_blocks: int) -> list[float]:
    """For each block, the sum of the throughputs of the servers that cover it."""
    totals = [0.0] * num_blocks
    for remote in sorted(spans, key=lambda remote: remote.peer):
        for block in range(remote.span.start, min(remote.span.end, num_blocks)):
            totals[block] += remote.record.throughput
    return totals


def choose_start(throughputs: Sequence[float], length: int) -> int:
    """Start of the ``length`` blocks whose weakest block is weakest, then second weakest, ...; lowest first."""
    if not 1 <= length <= len(throughputs):
        raise ValueError(f"cannot place {length} blocks among {len(throughputs)}")
    return min(
        range(len(throughputs) - length + 1),
        key=lambda start: (sorted(throughputs[start : start + length]), start),
    )


def choose_span(spans: Sequence[RemoteSpan], num_blocks: int, length: int) -> BlockSpan:
    """The first choice of a server that brings ``length`` blocks."""
    start = choose_start(block_throughputs(spans, num_blocks), length)
    return BlockSpan(start, start + length)


def should_move(
    spans: Sequence[RemoteSpan], peer: str, num_blocks: int, quality: float, rng: random.Random
) -> bool:
    """Whether ``peer`` should choose again: would the swarm's weakest block gain enough once all have settled?

    ``quality`` is how good today's weakest block may be, relative to what it could be, and still be left
    alone; 0 never moves, above 1 always. ValueError when ``peer`` is not among ``spans``.
    """
    if quality > 1.0:
        return True
    placed = {
        remote.peer: _Placed(remote.span.start, len(remote.span), remote.record.throughput)
        for remote in sorted(spans, key=lambda remote: remote.peer)
    }
    if peer not in placed:
        raise ValueError(f"{peer} has no span here")
    throughputs = block_throughputs(spans, num_blocks)
    before = min(throughputs)
    own = placed[peer]
    _add(throughputs, own, -own.throughput * (1 + _EPS))
    if before > _EPS and min(throughputs) <= 0:
        return False  # leaving would break the chain
    target = choose_start(throughputs, own.length)
    if target == own.start:
        return False
    _add(throughputs, own, own.throughput * _EPS)
    own.start = target
    _add(throughputs, own, own.throughput)
    _settle(throughputs, list(placed.values()), rng)
    after = min(throughputs)
    if after < before or after < _EPS:
        return False
    return before / after < quality - _EPS


def _settle(throughputs: list[float], servers: list[_Placed], rng: random.Random) -> None:
    """Let every server move to its best place, in random order, until none wants to."""
    is_moving = True
    rounds = 0
    while is_moving and rounds < _MAX_ROUNDS:
        is_moving = False
        rounds += 1
        for server in rng.sample(servers, len(servers)):
            _add(throughputs, server, -server.throughput * (1 + _EPS))
            target = choose_start(throughputs, server.length)
            _add(throughputs, server, server.throughput * _EPS)
            if target != server.start:
                server.start = target
                is_moving = True
            _add(throughputs, server, server.throughput)


def _add(throughputs: list[float], server: _Placed, amount: float) -> None:
    for block in server.blocks:
        throughputs[block] += amount
