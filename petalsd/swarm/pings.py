"""Round trips to other servers: smoothed, remembered for a while, measured a few at a time."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping

from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan

_WEIGHT = 0.2  # of a new measurement
_KEPT_S = 300.0
_SAMPLE = 5

Ping = Callable[[str], Awaitable[float]]


class PingTracker:
    """Measures with ``ping`` (peer -> seconds or inf) and keeps a moving average per peer for 300 s."""

    def __init__(self, ping: Ping, clock: Callable[[], float] = time.monotonic) -> None:
        self._ping = ping
        self._clock = clock
        self._known: dict[str, tuple[float, float]] = {}

    async def measure(self, peers: Collection[str]) -> None:
        """Ping all of them at once."""
        targets = list(peers)
        for peer, rtt in zip(targets, await asyncio.gather(*map(self._ping, targets)), strict=True):
            self._record(peer, rtt)

    def averages(self) -> dict[str, float]:
        """Seconds per peer, ``inf`` for one that did not answer."""
        now = self._clock()
        self._known = {peer: entry for peer, entry in self._known.items() if entry[1] > now}
        return {peer: rtt for peer, (rtt, _) in self._known.items()}

    def _record(self, peer: str, rtt: float) -> None:
        old = self.averages().get(peer, math.inf)
        smoothed = rtt if math.isinf(old) else _WEIGHT * rtt + (1 - _WEIGHT) * old
        self._known[peer] = (smoothed, self._clock() + _KEPT_S)


def choose_targets(
    blocks: Mapping[int, Mapping[str, ServerRecord]], span: BlockSpan, own_peer: str, rng: random.Random
) -> list[str]:
    """Whom a route may go to from inside or from the end of our ``span``: at most five servers of each kind."""
    inner = {peer for block in range(span.start + 1, span.end) for peer in blocks.get(block, {})}
    following = set(blocks.get(span.end, {}))
    chosen = {*_sample(inner, rng), *_sample(following, rng)}
    return sorted(chosen - {own_peer})


def _sample(peers: Collection[str], rng: random.Random) -> list[str]:
    return rng.sample(sorted(peers), min(_SAMPLE, len(peers)))
