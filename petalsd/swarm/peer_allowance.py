"""What each peer may take of something: so much at once, and so much in the long run."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

from petalsd.errors import Overloaded

_MAX_PEERS = 4096
# Of the loop's time; a server of 80 blocks that reads and writes all records every ten seconds takes a hundredth.
_TIME_SHARE = 0.05
_TIME_BURST_S = 2.0


class PeerAllowance:
    """``burst`` at once, and ``per_s`` a second.

    Of each peer that took some lately it is known when that will be paid; of too many, only of those who owe most.
    """

    def __init__(self, burst: float, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._per_s = per_s
        self._clock = clock
        self._paid_at_s: dict[str, float] = {}

    def has(self, peer: str, amount: float = 0.0) -> bool:
        """Whether it may take so much now."""
        return self.owed_by(peer) + amount <= self._burst

    def owed_by(self, peer: str) -> float:
        """Of what it took, what time has not paid yet."""
        return max(0.0, self._paid_at_s.get(peer, 0.0) - self._clock()) * self._per_s

    def charge(self, peer: str, amount: float) -> None:
        """It took so much, whether it might or not."""
        now_s = self._clock()
        self._paid_at_s[peer] = max(self._paid_at_s.get(peer, 0.0), now_s) + amount / self._per_s
        if len(self._paid_at_s) > _MAX_PEERS:
            owing = [(paid_at_s, peer) for peer, paid_at_s in self._paid_at_s.items() if paid_at_s > now_s]
            most = heapq.nlargest(_MAX_PEERS // 2, owing)
            self._paid_at_s = {peer: paid_at_s for paid_at_s, peer in most}

    def __len__(self) -> int:
        """Peers that are remembered."""
        return len(self._paid_at_s)


class OverShare(Overloaded):
    """A peer has had its share."""


class TimeShares(PeerAllowance):
    """Of the loop's time, for requests that are answered in it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(_TIME_BURST_S, _TIME_SHARE, clock)

    def check(self, peer: str) -> None:
        """OverShare when the peer has had its own."""
        if not self.has(peer):
            raise OverShare(
                f"your requests took {self.owed_by(peer):.1f} s more than {_TIME_SHARE:.0%} of this node's time",
                hint="ask less, or others",
            )
