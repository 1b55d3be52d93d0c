"""Which servers failed lately: a ban doubles with every failure since the last success."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Offence:
    count: int
    until: float


class Bans:
    """Bans by base58 PeerID: ``base_s * 2**k`` seconds, k = failures before this one since the last success.

    The reference consults its bans only when it reads the directory; here they hold from the next routing on.
    """

    def __init__(self, base_s: float, max_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._base_s = base_s
        self._max_s = max_s
        self._clock = clock
        self._offences: dict[str, _Offence] = {}

    def add(self, peer: str) -> float:
        """Ban the peer; returns for how many seconds.

        Failures of a peer that is banned already (several calls were under way to it) count as one.
        """
        now = self._clock()
        offence = self._offences.setdefault(peer, _Offence(0, now))
        if offence.until > now:
            return offence.until - now
        duration_s = min(self._base_s * 2.0**offence.count, self._max_s)
        offence.count += 1
        offence.until = now + duration_s
        return duration_s

    def clear(self, peer: str) -> None:
        """The peer answered well: forget its failures."""
        self._offences.pop(peer, None)

    def current(self) -> frozenset[str]:
        """The peers banned now."""
        now = self._clock()
        return frozenset(peer for peer, offence in self._offences.items() if offence.until > now)
