"""How many streams may be open at once, of all peers together and of each."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from petalsd.errors import Overloaded


class StreamRoom:
    """Streams of one kind. What is refused counts nowhere, so that no peer fills the room with it."""

    def __init__(self, max_streams: int, max_per_peer: int) -> None:
        self._max_streams = max_streams
        self._max_per_peer = max_per_peer
        self._num_streams = 0
        self._per_peer: Counter[str] = Counter()

    @contextlib.contextmanager
    def hold(self, peer: str) -> Iterator[None]:
        """Count a stream of this peer meanwhile. Overloaded when there is no room for it."""
        if self._num_streams >= self._max_streams:
            raise Overloaded(f"{self._max_streams} streams are open here")
        if self._per_peer[peer] >= self._max_per_peer:
            raise Overloaded(f"{self._max_per_peer} streams of yours are open here")
        self._num_streams += 1
        self._per_peer[peer] += 1
        try:
            yield
        finally:
            self._num_streams -= 1
            self._per_peer[peer] -= 1
            if not self._per_peer[peer]:
                del self._per_peer[peer]
