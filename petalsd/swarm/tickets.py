"""Sessions that another server handed to us, until their clients come for them."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

import structlog

from petalsd.engine.handle import Session
from petalsd.engine.step import SessionSpec
from petalsd.errors import BadRequest, NotServed, OutOfPages, Overloaded
from petalsd.swarm.escrow import Deposit, Outcome
from petalsd.swarm.observer import SwarmObserver
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_TICKET_BYTES = 32
_GRACE_S = 10.0  # clients that are in the middle of something come with their next step


@dataclass(slots=True)
class _Held:
    session: Session
    deposit: Deposit
    since_s: float  # on the loop's clock
    expiry: asyncio.TimerHandle


class TicketOffice:
    """Holds sessions for ``lifetime_s``, and ends those that nobody came for. How many, their deposits bound.

    On blocks that this server leaves they are held for ``grace_s``.
    """

    def __init__(self, lifetime_s: float, observer: SwarmObserver, grace_s: float = _GRACE_S) -> None:
        self._lifetime_s = lifetime_s
        self._grace_s = grace_s
        self._observer = observer
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def issue(self, session: Session, deposit: Deposit) -> str:
        """Own the session from now on; the ticket for its client."""
        ticket, now_s = secrets.token_urlsafe(_TICKET_BYTES), self._loop.time()
        expiry = self._loop.call_at(now_s + self._lifetime_s, self._expire, ticket)
        self._held[ticket] = _Held(session, deposit, now_s, expiry)
        return ticket

    def hasten(self, kept: BlockSpan | None) -> None:
        """This server leaves all blocks but ``kept``, and does not wait long for clients of sessions on others.

        One that comes too late replays its session elsewhere. Repeat it for sessions that arrive meanwhile.
        """
        for ticket, held in self._held.items():
            due_s = held.since_s + self._grace_s
            if not (kept and kept.covers(held.session.spec.span)) and due_s < held.expiry.when():
                held.expiry.cancel()
                held.expiry = self._loop.call_at(due_s, self._expire, ticket)

    def claim(self, ticket: str, spec: SessionSpec) -> Session:
        """The caller owns the session from now on, and its client's share of the pool pays for it.

        NotServed when there is none for this ticket and peer (any more); BadRequest when it is another one than
        ``spec`` says, then it waits on; OutOfPages or Overloaded when the client may not hold as much, then it is
        ended.
        """
        held = self._held.get(ticket)
        if held is None or held.session.spec.peer != spec.peer:
            raise NotServed("no session of this peer waits under this ticket")
        session = held.session
        ours = session.spec
        if _shape(ours) != _shape(spec):
            adapter = "no adapter" if ours.adapter is None else f"adapter {ours.adapter}"
            held_as = f"blocks {ours.span}, {ours.batch} rows, {ours.max_tokens} tokens, {adapter}"
            raise BadRequest("session_ticket", str(spec.span), f"the session was opened for {held_as}")
        if session.end_reason is None:
            self._charge(ticket, session)
        self._take_out(ticket)
        self._observer.handed_over(Outcome.CLAIMED if session.end_reason is None else Outcome.ENDED)
        return session

    def revoke(self, ticket: str) -> None:
        """End a session that its client cannot know of: it was not handed over."""
        self._take_out(ticket).end("its hand-over failed")

    def close(self, reason: str) -> None:
        """End what is held."""
        for ticket in list(self._held):
            self._end(ticket, reason, Outcome.ENDED)

    def _charge(self, ticket: str, session: Session) -> None:
        try:
            session.charge_to(session.spec.peer)
        except (OutOfPages, Overloaded) as error:
            log.info("claim_refused", client=session.spec.peer, error=error.message)
            self._end(ticket, error.message, Outcome.OVER_CLIENTS)
            raise

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def _expire(self, ticket: str) -> None:
        log.info("ticket_expired", held_s=round(self._loop.time() - self._held[ticket].since_s, 1))
        self._end(ticket, "nobody came for the session", Outcome.EXPIRED)

    def _end(self, ticket: str, reason: str, outcome: Outcome) -> None:
        self._take_out(ticket).end(reason)
        self._observer.handed_over(outcome)

    def _take_out(self, ticket: str) -> Session:
        held = self._held.pop(ticket)
        held.expiry.cancel()
        held.deposit.release()
        return held.session


def _shape(spec: SessionSpec) -> tuple[BlockSpan, int, int, str | None]:
    return spec.span, spec.batch, spec.max_tokens, spec.adapter
