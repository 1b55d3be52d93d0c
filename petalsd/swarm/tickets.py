"""Sessions that another server handed to us, until their clients come for them."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

import structlog

from petalsd.engine.handle import Session
from petalsd.engine.step import SessionSpec
from petalsd.errors import BadRequest, NotServed, Overloaded

log = structlog.get_logger(__name__)

_TICKET_BYTES = 32


@dataclass(frozen=True, slots=True)
class _Held:
    session: Session
    expiry: asyncio.TimerHandle


class TicketOffice:
    """Holds at most ``max_held`` sessions, each for ``lifetime_s``, and ends those that nobody came for."""

    def __init__(self, lifetime_s: float, max_held: int = 256) -> None:
        self._lifetime_s = lifetime_s
        self._max_held = max_held
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def check_room(self) -> None:
        if len(self._held) >= self._max_held:
            raise Overloaded(f"{self._max_held} sessions that were handed over wait for their clients here")

    def issue(self, session: Session) -> str:
        """Own the session from now on; the ticket for its client."""
        ticket = secrets.token_urlsafe(_TICKET_BYTES)
        expiry = asyncio.get_running_loop().call_later(self._lifetime_s, self._expire, ticket)
        self._held[ticket] = _Held(session, expiry)
        return ticket

    def claim(self, ticket: str, spec: SessionSpec) -> Session:
        """The caller owns the session from now on.

        NotServed when there is none for this ticket and peer (any more), BadRequest when it is another one than
        ``spec`` says; then it waits on.
        """
        held = self._held.get(ticket)
        if held is None or held.session.spec.peer != spec.peer:
            raise NotServed("no session of this peer waits under this ticket")
        ours = held.session.spec
        if (ours.span, ours.batch, ours.max_tokens) != (spec.span, spec.batch, spec.max_tokens):
            held_as = f"blocks {ours.span}, {ours.batch} rows, {ours.max_tokens} tokens"
            raise BadRequest("session_ticket", str(spec.span), f"the session was opened for {held_as}")
        del self._held[ticket]
        held.expiry.cancel()
        return held.session

    def revoke(self, ticket: str) -> None:
        """End a session that its client cannot know of."""
        self._end(ticket, "its hand-over failed")

    def close(self, reason: str) -> None:
        """End what is held."""
        for ticket in list(self._held):
            self._end(ticket, reason)

    def _expire(self, ticket: str) -> None:
        log.info("ticket_expired")
        self._end(ticket, "nobody came for the session")

    def _end(self, ticket: str, reason: str) -> None:
        held = self._held.pop(ticket)
        held.expiry.cancel()
        held.session.end(reason)
