"""What a session asks of the KV pool, and the pages it got."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from petalsd._C import PagePool


@dataclass(frozen=True, slots=True)
class KVRequest:
    """Room for ``batch`` rows of up to ``max_tokens`` tokens in ``num_blocks`` blocks from ``first_block`` on.

    ``peer`` is whose share of the pool it counts to at first; nobody's when it is empty.
    """

    first_block: int
    num_blocks: int
    batch: int
    max_tokens: int
    peer: str = ""

    def __str__(self) -> str:
        return f"{self.batch} row(s) of {self.max_tokens} tokens in {self.num_blocks} block(s)"


class KVSession:
    """The pages of an open session. It never runs out of them before ``max_tokens``.

    All rows have the same length. Everything but ``charge_to`` and ``close`` belongs to the engine thread, and
    raises SessionClosed once the session is closed, KVPoolError when an argument breaks the rule stated for it.
    """

    __slots__ = ("_on_credit", "_pages", "handle", "request")

    def __init__(
        self, request: KVRequest, pages: PagePool, handle: int, on_credit: Callable[[], None]
    ) -> None:
        self.request = request
        self.handle = handle
        self._pages = pages
        self._on_credit = on_credit

    @property
    def batch(self) -> int:
        return self.request.batch

    @property
    def length(self) -> int:
        """Tokens that each row holds."""
        return self._pages.length(self.handle)

    def extend(self, length: int) -> None:
        """Map pages so that each row covers ``length`` tokens, ``self.length <= length <= max_tokens``.

        After ``KVPool.make_room`` for that length, where the pool has a spill file. May log page copies and move
        pages of any session: ``KVPool.apply_copies`` before the next batch.
        """
        self._pages.extend(self.handle, length)

    def truncate(self, length: int) -> None:
        """Roll each row back to its first ``length`` tokens, ``0 <= length <= self.length``."""
        self._pages.truncate(self.handle, length)

    def reorder(self, hypo_ids: Sequence[int]) -> None:
        """Row j continues from old row ``hypo_ids[j]``: ``batch`` numbers in ``[0, batch)``. No copy yet."""
        self._pages.reorder(self.handle, hypo_ids)

    def overwrite(self, start: int, end: int) -> None:
        """Tokens ``start`` to ``end - 1`` of each row, which are in memory, are about to be written over.

        Not where rows share pages.
        """
        self._pages.overwrite(self.handle, start, end)

    def charge_to(self, peer: str) -> None:
        """Count to the share of ``peer`` from now on, on any thread; OutOfPages when that may not hold as much."""
        self._pages.charge(self.handle, peer)
        self._on_credit()

    def close(self) -> None:
        """Give the pages back; on any thread, any number of times.

        Their content stays until the engine thread extends a session, so a running batch may still read them.
        """
        self._pages.close(self.handle)
        self._on_credit()
