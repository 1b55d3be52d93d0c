"""The giver's side of a hand-over: which server takes a session, and the way of its keys and values there."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import structlog
from hivemind.proto import runtime_pb2

from petalsd.engine.handle import Session
from petalsd.engine.step import SessionSpec
from petalsd.errors import BadRequest, DeadlineExceeded, PetalsdError, RemoteFailure, SessionMoved, SwarmError
from petalsd.swarm.directory import RemoteSpan, SwarmView
from petalsd.swarm.handover import KVShape, Offer, Seal, pack_chunk, pack_text, unpack_text
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.serving import ServedModel
from petalsd.swarm.stream import MessageStream
from petalsd.swarm.stub import ServerStub

log = structlog.get_logger(__name__)

_MAX_ATTEMPTS = 3
_OFFER_S = 10.0
_MAX_AT_ONCE = 4


def takers(view: SwarmView, own_peer: str, spec: SessionSpec) -> list[RemoteSpan]:
    """Servers of petalsd that hold all blocks of a session, at random, those that announce room for it first."""
    fitting = [
        remote
        for remote in view.spans(ServerState.ONLINE)
        if remote.peer != own_peer
        and remote.span.covers(spec.span)
        and "petalsd" in (remote.record.version or "")
    ]
    random.shuffle(fitting)
    return sorted(fitting, key=lambda remote: not _has_room(remote, spec))


def _has_room(remote: RemoteSpan, spec: SessionSpec) -> bool:
    """As far as its record says; it counts keys and values."""
    left = remote.record.cache_tokens_left
    return left is None or left >= 2 * spec.batch * spec.max_tokens * len(spec.span)


class SessionGiver:
    """Carries sessions to servers of ``view``, a few at once, within ``deadline_s`` for each."""

    def __init__(
        self,
        view: SwarmView,
        own_peer: str,
        connect: Callable[[str], ServerStub],
        model: ServedModel,
        deadline_s: float,
    ) -> None:
        self._view = view
        self._own_peer = own_peer
        self._connect = connect
        self._model = model
        self._deadline_s = deadline_s
        self._turns = asyncio.Semaphore(_MAX_AT_ONCE)

    async def carry(self, session: Session) -> SessionMoved:
        """Where the session goes on; the caller ends it here. Only while no step of it is under way.

        Raises the last taker's error, or SwarmError when there is nobody to ask.
        """
        error: PetalsdError = SwarmError(f"no other server of petalsd serves blocks {session.spec.span}")
        async with self._turns:
            for remote in self._candidates(session.spec):
                try:
                    async with asyncio.timeout(self._deadline_s):
                        ticket = await self._give(session, self._connect(remote.peer))
                except TimeoutError:
                    error = RemoteFailure(
                        remote.peer, f"did not take the session within {self._deadline_s:g} s"
                    )
                except ValueError:  # a record under what is no PeerID
                    continue
                except (SwarmError, DeadlineExceeded) as failure:
                    error = failure
                else:
                    return SessionMoved(remote.peer, ticket)
                log.info("hand_over_refused", taker=remote.peer, error=error.message)
        raise error

    def _candidates(self, spec: SessionSpec) -> Sequence[RemoteSpan]:
        return takers(self._view, self._own_peer, spec)[:_MAX_ATTEMPTS]

    async def _give(self, session: Session, stub: ServerStub) -> str:
        stream = await stub.open_hand_over()
        try:
            return await self._talk(session, stream)
        finally:
            stream.close()

    async def _talk(self, session: Session, stream: MessageStream) -> str:
        """The ticket. RemoteFailure for whatever the taker does wrong."""
        offer = Offer(session.spec, session.position, KVShape.of(session, self._model.dtype))
        opening = offer.to_wire(self._model.prefix)
        seal = Seal(opening)
        await stream.send(opening)
        await _answer(stream)
        for place in offer.places():
            if stream.has_arrived:  # nothing but a refusal can have
                await _answer(stream)
            message = pack_chunk(await session.read_kv(place))
            seal.add(message)
            await stream.send(message)
        await stream.send(runtime_pb2.ExpertRequest(metadata=pack_text("digest", seal.digest)))
        try:
            return unpack_text((await _answer(stream)).metadata, "ticket")
        except BadRequest as error:
            raise RemoteFailure(stream.peer, f"answered nonsense: {error.message}") from error


async def _answer(stream: MessageStream) -> runtime_pb2.ExpertResponse:
    try:
        reply = await stream.receive(runtime_pb2.ExpertResponse, _OFFER_S)
    except TimeoutError:
        raise RemoteFailure(stream.peer, f"did not answer the hand-over within {_OFFER_S:g} s") from None
    if reply is None:
        raise RemoteFailure(stream.peer, "ended the hand-over without a word")
    return reply


class Relocation:
    """An errand of one session: to go elsewhere. ``over`` once it has ended, ``has_moved`` says how."""

    def __init__(self, giver: SessionGiver) -> None:
        self._giver = giver
        self.over = asyncio.Event()
        self.has_moved = False

    async def __call__(self, session: Session) -> None:
        """Raises SessionMoved, for the client; returns when the session stays."""
        span = str(session.spec.span)
        try:
            moved = await self._giver.carry(session)
            self.has_moved = True
        except PetalsdError as error:
            log.info("session_stays", span=span, error=error.message)
            return
        finally:
            self.over.set()
        log.info("session_handed_over", taker=moved.peer, span=span, position=session.position)
        raise moved

    def drop(self) -> None:
        self.over.set()
