"""The taker's side of a hand-over: who may give, what it may leave here, the pages, and then a ticket."""

from __future__ import annotations

import structlog
from hivemind.proto import runtime_pb2

from petalsd.engine.checks import check_span
from petalsd.engine.handle import Session
from petalsd.engine.step import SessionSpec
from petalsd.errors import BadRequest, NotServed, OutOfPages, Overloaded
from petalsd.kvcache.pool import KVPool
from petalsd.swarm.escrow import Amount, Deposit, Escrow, EscrowFull, EscrowLimits, Outcome
from petalsd.swarm.givers import KnownGivers, UnknownGiver
from petalsd.swarm.handover import Intake, KVShape, Offer, pack_text
from petalsd.swarm.off_loop import off_loop
from petalsd.swarm.serving import Serving
from petalsd.swarm.stream import MessageStream
from petalsd.swarm.tickets import TicketOffice

log = structlog.get_logger(__name__)

_LIMITS = EscrowLimits()
_OFFER_S = 10.0  # until then a giver has said what it offers


class SessionTaker:
    """Answers ``rpc_take``; whatever fails gives the pages back, and the giver is told why."""

    def __init__(
        self,
        serving: Serving,
        givers: KnownGivers,
        tickets: TicketOffice,
        limits: EscrowLimits = _LIMITS,
    ) -> None:
        self._serving = serving
        self._givers = givers
        self._tickets = tickets
        self.escrow = Escrow(self._whole, limits)

    async def take(self, stream: MessageStream) -> None:
        """One offer from its begin to the ticket. The caller sets the deadline."""
        try:
            await self._take(stream)
        except BaseException as error:
            outcome = _refusal(error)
            self._serving.observer.handed_over(outcome)
            log.info("session_not_taken", giver=stream.peer, outcome=outcome.value, error=str(error))
            raise

    async def _take(self, stream: MessageStream) -> None:
        opening = await self._receive(stream, _OFFER_S)
        offer = Offer.parse(opening, self._serving.model.prefix)
        self._serving.check_open(offer.spec.peer)
        check_span(offer.spec.span, self._serving.engine.span)
        await self._givers.check(stream.peer, offer.spec.span)
        deposit = self.escrow.take_in(stream.peer, self._amount(offer.spec))
        session = await self._open(offer.spec, stream.peer, deposit)
        try:
            self._check_shape(session, offer)
            await stream.send(runtime_pb2.ExpertResponse())
            position = await self._fill(session, Intake(offer, opening), stream)
            session.resume_at(position)  # where it has ended meanwhile, its client is better off where it is
        except BaseException:
            session.end("its hand-over failed")
            raise
        ticket = self._tickets.issue(session, deposit)
        log.info("session_taken", giver=stream.peer, span=str(offer.spec.span), position=position)
        try:
            await stream.send(runtime_pb2.ExpertResponse(metadata=pack_text("ticket", ticket)))
        except BaseException:  # nobody will ever know it
            self._tickets.revoke(ticket)
            raise
        self._serving.observer.handed_over(Outcome.TAKEN)

    async def _open(self, spec: SessionSpec, giver: str, deposit: Deposit) -> Session:
        """At the giver's expense: only it says whose session it is. However it ends, the deposit goes back."""
        try:
            session = await self._serving.engine.open_session(spec, giver)
        except BaseException:
            deposit.release()
            raise
        session.when_ended(lambda _: deposit.release())
        return session

    @property
    def _pool(self) -> KVPool:
        pool = self._serving.engine.pool
        if pool is None:
            raise NotServed("no blocks are served here now")
        return pool

    def _whole(self) -> Amount:
        return Amount(0, self._serving.engine.limits.max_sessions, self._pool.stats().pages_promisable)

    def _amount(self, spec: SessionSpec) -> Amount:
        runs = self._pool.geometry.tokens_to_pages(max(1, spec.max_tokens))
        return Amount(1, spec.batch, spec.batch * runs * len(spec.span))

    def _check_shape(self, session: Session, offer: Offer) -> None:
        ours = KVShape.of(session, self._serving.model.dtype)
        if offer.shape != ours:
            raise BadRequest("dtype and heads", str(offer.shape), f"this server computes with {ours}")

    async def _fill(self, session: Session, intake: Intake, stream: MessageStream) -> int:
        """The position that the session has then."""
        while (message := await self._receive(stream)).tensors:
            place, chunk = await off_loop(message.ByteSize(), intake.accept, message)
            await session.write_kv(place, chunk)
        return intake.end(message)

    async def _receive(
        self, stream: MessageStream, timeout_s: float | None = None
    ) -> runtime_pb2.ExpertRequest:
        message = await stream.receive(runtime_pb2.ExpertRequest, timeout_s)
        if message is None:
            raise BadRequest("message", None, "the hand-over ended before its digest")
        return message


def _refusal(error: BaseException) -> Outcome:
    if isinstance(error, UnknownGiver):
        return Outcome.UNKNOWN_GIVER
    if isinstance(error, EscrowFull):
        return Outcome.OVER_SHARE
    return Outcome.NO_ROOM if isinstance(error, OutOfPages | Overloaded) else Outcome.FAILED
