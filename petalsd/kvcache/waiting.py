"""Waiting for pages: the queue is in C++, the tasks that wait are here."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

from petalsd._C import PagePool
from petalsd.errors import OutOfPages, PetalsdError
from petalsd.kvcache.session import KVRequest


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """Who may wait and who goes first.

    max_waiters     sessions that may wait at once, half of them of one peer
    max_peer_share  of all that can be promised, what one peer may hold; its first session may be larger. It holds
                    always, not only while others wait: sessions live long and most clients do not wait, so by
                    the time somebody waits it is too late to keep room for them
    bypass_wait_s   until it has waited so long, a request that wants more than there is may be passed by smaller
    max_bypasses    and until so many have passed it
    """

    max_waiters: int = 64
    max_peer_share: float = 1.0
    bypass_wait_s: float = 2.0
    max_bypasses: int = 8


@dataclass(frozen=True, slots=True)
class _Waiter:
    peer: str
    loop: asyncio.AbstractEventLoop
    outcome: asyncio.Future[PetalsdError | None]

    def wake(self, error: PetalsdError | None = None) -> None:
        """Call on any thread; RuntimeError when the loop is closed."""
        self.loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, error: PetalsdError | None) -> None:
        if not self.outcome.done():  # the task may have been cancelled
            self.outcome.set_result(error)


class WaitingRoom:
    """Tasks that wait for the credit of their request, ``max_waiters`` at most.

    Credit may come back on any thread (a session closes on the engine thread); whoever gave it back calls
    ``deliver``.
    """

    def __init__(self, pages: PagePool, max_waiters: int) -> None:
        self._pages = pages
        self._max_waiters = max_waiters
        self._waiters: dict[int, _Waiter] = {}
        # Queueing a request and noting its waiter are one step, or a grant could find nobody.
        self._lock = threading.Lock()

    async def wait(self, request: KVRequest, timeout_s: float) -> int:
        """The handle of an open session after at most ``timeout_s``, else OutOfPages. Cancelling withdraws."""
        handle, outcome = self._enter(request)
        try:
            async with asyncio.timeout(timeout_s):
                if (error := await outcome) is not None:
                    raise error
        except TimeoutError:
            self._leave(handle)
            raise OutOfPages(
                f"the session ({request}) got no pages within {timeout_s:g} s",
                hint="retry later, or ask for a smaller max_length",
            ) from None
        except BaseException:
            self._leave(handle)
            raise
        return handle

    def deliver(self) -> None:
        """Wake the tasks whose requests were granted meanwhile."""
        while True:
            with self._lock:
                handles = self._pages.granted()
                ready = [(handle, self._waiters.pop(handle)) for handle in handles]
            if not ready:
                return
            for handle, waiter in ready:
                try:
                    waiter.wake()
                except RuntimeError:  # its loop is closed: nobody will ever use the pages
                    self._pages.close(handle)

    def dismiss(self, error: PetalsdError) -> None:
        """End every wait with ``error``; the waiters withdraw their requests as they wake."""
        with self._lock:
            waiters = list(self._waiters.values())
        for waiter in waiters:
            waiter.wake(error)

    def _enter(self, request: KVRequest) -> tuple[int, asyncio.Future[PetalsdError | None]]:
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[PetalsdError | None] = loop.create_future()
        with self._lock:
            self._check_room(request.peer)
            handle = self._pages.request(
                request.first_block, request.num_blocks, request.batch, request.max_tokens, request.peer
            )
            self._waiters[handle] = _Waiter(request.peer, loop, outcome)
        self.deliver()
        return handle, outcome

    def _check_room(self, peer: str) -> None:
        num_own = sum(waiter.peer == peer for waiter in self._waiters.values()) if peer else 0
        if len(self._waiters) >= self._max_waiters or num_own >= -(-self._max_waiters // 2):
            raise OutOfPages(
                f"{len(self._waiters)} sessions wait for pages already, {num_own} of them yours",
                hint="retry later, or use another server",
            )

    def _leave(self, handle: int) -> None:
        """Withdraw the request; also when it was granted in the meantime."""
        with self._lock:
            self._waiters.pop(handle, None)
            self._pages.close(handle)
        self.deliver()
