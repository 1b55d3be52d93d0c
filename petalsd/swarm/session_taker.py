"""The taker's side of a hand-over: pages under the same admission as for any session, then a ticket."""

from __future__ import annotations

import structlog
from hivemind.proto import runtime_pb2

from petalsd.engine.handle import Session
from petalsd.errors import BadRequest
from petalsd.swarm.handover import KVShape, Offer, Seal, pack_text, unpack_chunk, unpack_text
from petalsd.swarm.serving import Serving
from petalsd.swarm.stream import MessageStream
from petalsd.swarm.tickets import TicketOffice

log = structlog.get_logger(__name__)


class SessionTaker:
    """Answers ``rpc_take``; whatever fails gives the pages back, and the giver is told why."""

    def __init__(self, serving: Serving, tickets: TicketOffice) -> None:
        self._serving = serving
        self._tickets = tickets

    async def take(self, stream: MessageStream) -> None:
        """One offer from its begin to the ticket. The caller sets the deadline."""
        opening = await self._receive(stream)
        offer = Offer.parse(opening, self._serving.model.prefix)
        self._serving.check_open()
        self._tickets.check_room()
        session = await self._serving.engine.open_session(offer.spec)
        try:
            self._check_shape(session, offer)
            await stream.send(runtime_pb2.ExpertResponse())
            await self._fill(session, offer, opening, stream)
        except BaseException:
            session.end("its hand-over failed")
            raise
        session.resume_at(offer.position)
        ticket = self._tickets.issue(session)
        log.info("session_taken", giver=stream.peer, span=str(offer.spec.span), position=offer.position)
        try:
            await stream.send(runtime_pb2.ExpertResponse(metadata=pack_text("ticket", ticket)))
        except BaseException:  # nobody will ever know it
            self._tickets.revoke(ticket)
            raise

    def _check_shape(self, session: Session, offer: Offer) -> None:
        ours = KVShape.of(session, self._serving.model.dtype)
        if offer.shape != ours:
            raise BadRequest("dtype and heads", str(offer.shape), f"this server computes with {ours}")

    async def _fill(
        self, session: Session, offer: Offer, opening: runtime_pb2.ExpertRequest, stream: MessageStream
    ) -> None:
        seal = Seal(opening)
        for place in offer.places():
            message = await self._receive(stream)
            seal.add(message)
            await session.write_kv(place, unpack_chunk(message, offer, place))
        digest = unpack_text((await self._receive(stream)).metadata, "digest")
        if digest != seal.digest:
            raise BadRequest("digest", digest, "not that of what arrived")

    async def _receive(self, stream: MessageStream) -> runtime_pb2.ExpertRequest:
        message = await stream.receive(runtime_pb2.ExpertRequest)
        if message is None:
            raise BadRequest("message", None, "the hand-over ended before its digest")
        return message
