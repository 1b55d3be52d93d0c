"""Open inference sessions by their id, and the steps that wait for each of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from petalsd.engine.handle import Session
from petalsd.errors import BadRequest, PetalsdError
from petalsd.swarm.requests import StepMessage
from petalsd.types import BlockSpan

_MAX_WAITING = 2
_MAX_PUSHED = 4


class Errand(Protocol):
    """What a session's own task does with it between two steps."""

    async def __call__(self, session: Session) -> None:
        """What it raises ends the session, and the client is told."""

    def drop(self) -> None:
        """The session is over before its turn came; harmless when repeated."""


class StepInbox:
    """Steps of one session: from its client and from the server before us. The client's go first.

    One task puts, one gets; pushes come from any. ``span`` is set once the session is open. ``keep_pushed`` is
    told how many bytes of a pushed step to count from now on, and raises when they are too many.
    """

    def __init__(self, keep_pushed: Callable[[int], None] = lambda _: None) -> None:
        self.span: BlockSpan | None = None
        self._keep_pushed = keep_pushed
        self._from_client: deque[StepMessage] = deque()
        self._pushed: deque[StepMessage] = deque()
        self._pusher: str | None = None
        self._is_ended = self._is_closed = False
        self._failure: PetalsdError | None = None
        self._errand: Errand | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def has_room(self) -> bool:
        """Whether the client's next step should be taken from the wire."""
        return len(self._from_client) < _MAX_WAITING and not self._is_ended

    def put(self, message: StepMessage) -> None:
        """Add a step of the client, when there is room for it."""
        self._from_client.append(message)
        self._wake()

    def push(self, message: StepMessage, peer: str) -> bool:
        """Add a pushed step. Not taken when too many wait or another peer pushes here: the client sends it too.

        Overloaded when it is taken but for its size.
        """
        if self._pusher not in (None, peer) or len(self._pushed) >= _MAX_PUSHED or self._is_ended:
            return False
        self._keep_pushed(message.kept_bytes)
        self._pusher = peer
        self._pushed.append(message)
        self._wake()
        return True

    def end(self) -> None:
        """The client sends no more: what it sent is still handed out, pushed steps are not."""
        self._is_ended = True
        self._wake()

    def fail(self, error: PetalsdError) -> None:
        """The session is over on our side: whoever waits for a step gets the error, at once."""
        self._failure = error
        self._wake()

    def send_on(self, errand: Errand) -> None:
        """Hand out ``errand`` before the next step, instead of one that waits."""
        self._drop_errand()
        if self._is_closed:
            return errand.drop()
        self._errand = errand
        self._wake()

    def close(self) -> None:
        """Nobody gets anything any more: an errand that waits is dropped, and so is what comes later."""
        self._is_closed = True
        self._drop_errand()

    def _drop_errand(self) -> None:
        if self._errand is not None:
            self._errand.drop()
            self._errand = None

    async def get(self) -> StepMessage | Errand | None:
        """The next step or errand; None when the client has ended the session. Raises what it has failed with."""
        while True:
            if self._failure is not None:
                raise self._failure
            if self._errand is not None:
                errand, self._errand = self._errand, None
                return errand
            if self._from_client:
                return self._from_client.popleft()
            if self._is_ended:
                return None
            if self._pushed:
                return self._pushed.popleft()
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class SessionRegistry:
    """Session ids in use at this server."""

    def __init__(self) -> None:
        self._inboxes: dict[str, StepInbox] = {}

    def __len__(self) -> int:
        return len(self._inboxes)

    @contextlib.contextmanager
    def claim(self, session_id: str | None, inbox: StepInbox) -> Iterator[None]:
        """Hold an id while the session lives; BadRequest when another session holds it. None needs no id."""
        if session_id is None:
            yield
            return
        if session_id in self._inboxes:
            raise BadRequest("session_id", session_id, "another session has it already")
        self._inboxes[session_id] = inbox
        try:
            yield
        finally:
            del self._inboxes[session_id]

    def deliver(self, session_id: str, span: BlockSpan, message: StepMessage, peer: str) -> bool:
        """Hand a pushed step to its session; False when there is none or it does not take it."""
        inbox = self._inboxes.get(session_id)
        if inbox is None or inbox.span != span:
            return False
        return inbox.push(message, peer)
