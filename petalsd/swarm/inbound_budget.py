"""Bytes of large messages and of unary calls that a node holds, while they come and until they are dealt with."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from petalsd.errors import Overloaded

_HINT = "try again later or use another server"


class Budget(Protocol):
    """What one stream counts its messages against, or one call its request."""

    @property
    def max_message_bytes(self) -> int: ...

    def take(self, num_bytes: int) -> None:
        """Overloaded when there is not as much."""

    def give_back(self, num_bytes: int) -> None: ...


class InboundBudget:
    """Of all streams and unary calls of a node together."""

    def __init__(self, max_message_bytes: int, max_total_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._max_total_bytes = max_total_bytes
        self._held_bytes = 0
        self._by_peer: Counter[str] = Counter()

    @property
    def max_message_bytes(self) -> int:
        return self._max_message_bytes

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def share_of(self, peer: str, max_message_bytes: int | None = None) -> Budget:
        """For the streams and calls of a peer: half of all, but a message of any size while it holds none.

        ``max_message_bytes``: what one may have where messages are small; None: as anywhere.
        """
        share_bytes = max(self._max_total_bytes // 2, self._max_message_bytes)
        if max_message_bytes is None:
            max_message_bytes = self._max_message_bytes
        return _PeerShare(self, self._by_peer, peer, share_bytes, max_message_bytes)

    def take(self, num_bytes: int) -> None:
        if self._held_bytes + num_bytes > self._max_total_bytes:
            raise Overloaded(
                f"{self._held_bytes} bytes of requests are under way, the limit is {self._max_total_bytes}",
                hint=_HINT,
            )
        self._held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._held_bytes -= num_bytes


class _PeerShare:
    def __init__(
        self, whole: InboundBudget, by_peer: Counter[str], peer: str, max_bytes: int, max_message_bytes: int
    ) -> None:
        self._whole = whole
        self._by_peer = by_peer
        self._peer = peer
        self._max_bytes = max_bytes
        self.max_message_bytes = max_message_bytes

    def take(self, num_bytes: int) -> None:
        held = self._by_peer[self._peer]
        if held + num_bytes > self._max_bytes:
            raise Overloaded(
                f"{held} bytes of requests of yours are under way, a peer may have {self._max_bytes}",
                hint=_HINT,
            )
        self._whole.take(num_bytes)
        self._by_peer[self._peer] = held + num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._whole.give_back(num_bytes)
        self._by_peer[self._peer] -= num_bytes
        if not self._by_peer[self._peer]:
            del self._by_peer[self._peer]
