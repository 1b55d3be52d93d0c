"""Rows of open sessions: how many there may be, and how many of them one peer may have."""

from __future__ import annotations

from collections import Counter

from petalsd.errors import Overloaded


class OpenRows:
    """Counts rows of sessions from the moment when they ask for pages until they end.

    ``max_per_peer`` holds always, as the share of the pages does; a peer's first session may be larger.
    """

    def __init__(self, max_rows: int, max_per_peer: int) -> None:
        self._max_rows = max_rows
        self._max_per_peer = max_per_peer
        self._by_peer: Counter[str] = Counter()
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    def take(self, peer: str, rows: int) -> RowHold:
        """Count ``rows`` rows of a session to ``peer``; Overloaded when there are too many, of all or of it."""
        if self._total + rows > self._max_rows:
            raise Overloaded(
                f"{self._total} of {self._max_rows} rows are open, {rows} more were asked for",
                hint="retry later, or use another server",
            )
        self._count(peer, rows)
        self._total += rows
        return RowHold(self, peer, rows)

    def move(self, hold: RowHold, peer: str) -> None:
        """Count them to ``peer`` from now on; Overloaded, and everything as before, when that has too many."""
        if peer != hold.peer:
            self._count(peer, hold.rows)
            self._discount(hold.peer, hold.rows)

    def give_back(self, hold: RowHold) -> None:
        self._discount(hold.peer, hold.rows)
        self._total -= hold.rows

    def _count(self, peer: str, rows: int) -> None:
        held = self._by_peer[peer]
        if held and held + rows > self._max_per_peer:
            raise Overloaded(
                f"{held} rows of yours are open, {rows} more were asked for, a peer may have {self._max_per_peer}",
                hint="retry later, or use another server",
            )
        self._by_peer[peer] = held + rows

    def _discount(self, peer: str, rows: int) -> None:
        self._by_peer[peer] -= rows
        if not self._by_peer[peer]:
            del self._by_peer[peer]


class RowHold:
    """The rows of one session, until it gives them back."""

    def __init__(self, books: OpenRows, peer: str, rows: int) -> None:
        self.peer = peer
        self.rows = rows
        self._books = books
        self._is_held = True

    def charge_to(self, peer: str) -> None:
        """Count to ``peer`` from now on; Overloaded when that has too many."""
        if self._is_held:
            self._books.move(self, peer)
            self.peer = peer

    def give_back(self) -> None:
        """Any number of times."""
        if self._is_held:
            self._is_held = False
            self._books.give_back(self)
