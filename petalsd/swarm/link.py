"""How fast our link to the other peers is, from the large messages that cross it anyway. Pure."""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

ASSUMED_MBPS = 100.0  # what stock servers assume when they cannot measure

LARGE_BYTES = 2**20  # of less, latency would be measured and not the link
_SMALL_BYTES = 64 * 1024
_RECENT_S = 3600.0
_KEPT, _ENOUGH = 64, 5
# Each transfer was as slow as the slower of two links and what else crossed them: the best show what ours can
# do, and of those the very best may have been luck.
_QUANTILE = 0.9
_MAX_PEERS = 256


class LinkSpeed(NamedTuple):
    """Of the slower direction. ``is_measured``: transfers showed it; else it is what is assumed until they do."""

    mbps: float
    is_measured: bool


class LinkMeter:
    """Told of transfers, it says how many Mbit/s the link carries."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates: dict[bool, deque[tuple[float, float]]] = {
            is_upload: deque(maxlen=_KEPT) for is_upload in (False, True)
        }
        self._latencies: OrderedDict[str, float] = OrderedDict()

    def acknowledged(self, peer: str, num_bytes: int, seconds: float) -> None:
        """``peer`` answered a message of ours that long after it was sent.

        The quickest answer to a small message tells how much of the time has nothing to do with the bytes.
        """
        if num_bytes <= _SMALL_BYTES:
            self._latencies[peer] = min(seconds, self._latencies.pop(peer, math.inf))
            if len(self._latencies) > _MAX_PEERS:
                self._latencies.popitem(last=False)
            return
        latency_s = min(self._latencies.get(peer, 0.0), seconds / 2)
        self.flowed(num_bytes, seconds - latency_s, is_upload=True)

    def flowed(self, num_bytes: int, seconds: float, *, is_upload: bool) -> None:
        """So many bytes of one message passed in so many seconds; few bytes tell nothing and are ignored."""
        if num_bytes >= LARGE_BYTES and seconds > 0:
            self._rates[is_upload].append((self._clock(), num_bytes * 8e-6 / seconds))

    def speed(self) -> LinkSpeed:
        """A direction of which too little was seen within the last hour counts as what is assumed."""
        seen = [self._mbps(rates) for rates in self._rates.values()]
        mbps = min(ASSUMED_MBPS if one is None else one for one in seen)
        return LinkSpeed(mbps, mbps in seen)

    def _mbps(self, rates: Iterable[tuple[float, float]]) -> float | None:
        oldest = self._clock() - _RECENT_S
        recent = sorted(rate for at, rate in rates if at >= oldest)
        if len(recent) < _ENOUGH:
            return None
        return recent[math.ceil(_QUANTILE * len(recent)) - 1]
