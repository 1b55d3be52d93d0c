"""The giver's side of a hand-over: which server takes a session, and the way of its keys and values there."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence

import structlog
from hivemind.proto import runtime_pb2

from petalsd.engine.handle import Session
from petalsd.engine.kv_transfer import KeysValues, Place, RolledBack
from petalsd.engine.step import SessionSpec
from petalsd.errors import (
    BadRequest,
    DeadlineExceeded,
    Overloaded,
    PetalsdError,
    RemoteFailure,
    SessionClosed,
    SessionMoved,
    SwarmError,
)
from petalsd.swarm.directory import RemoteSpan, SwarmView
from petalsd.swarm.handover import KVShape, Offer, Seal, pack_chunk, pack_end, unpack_text
from petalsd.swarm.off_loop import off_loop
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.serving import ServedModel
from petalsd.swarm.sessions import Errand
from petalsd.swarm.stream import MessageStream
from petalsd.swarm.stub import ServerStub

log = structlog.get_logger(__name__)

_MAX_ATTEMPTS = 3
_OFFER_S = 10.0  # for an answer, and for reading what was sent: steps may wait for it
_MAX_AT_ONCE = 4
_REFUSAL_S = 60.0  # a drain asks every 5 s


class Refusals:
    """Servers that did not take a session lately. They are asked after all others: they may have room again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until_s: dict[str, float] = {}

    def note(self, peer: str) -> None:
        now = self._clock()
        self._until_s = {other: until_s for other, until_s in self._until_s.items() if until_s > now}
        self._until_s[peer] = now + _REFUSAL_S

    def __contains__(self, peer: str) -> bool:
        return self._until_s.get(peer, 0.0) > self._clock()


def takers(view: SwarmView, own_peer: str, spec: SessionSpec, refusals: Refusals) -> list[RemoteSpan]:
    """Servers of petalsd that hold all blocks of a session, at random, those that announce room for it first.

    Those that have refused one lately come last, whatever they announce.
    """
    fitting = [
        remote
        for remote in view.spans(ServerState.ONLINE)
        if remote.peer != own_peer
        and remote.span.covers(spec.span)
        and "petalsd" in (remote.record.version or "")
        and (spec.adapter is None or spec.adapter in remote.record.adapters)
    ]
    random.shuffle(fitting)
    return sorted(fitting, key=lambda remote: (remote.peer in refusals, not _has_room(remote, spec)))


def _has_room(remote: RemoteSpan, spec: SessionSpec) -> bool:
    """As far as its record says; it counts keys and values."""
    left = remote.record.cache_tokens_left
    return left is None or left >= 2 * spec.batch * spec.max_tokens * len(spec.span)


class HandOver:
    """One session on its way to one taker: what it has there already, and what it still lacks."""

    def __init__(self, session: Session, stream: MessageStream, model: ServedModel) -> None:
        self._session = session
        self._stream = stream
        self._offer = Offer(session.spec, KVShape.of(session, model.dtype))
        self._opening = self._offer.to_wire(model.prefix)
        self._seal = Seal(self._opening)

    async def copy(self) -> None:
        """Offer the session, and send what it has, beside its steps; then what these have added or changed.

        Again and again until what is left goes at once, or does not get less. RemoteFailure for whatever the taker
        does wrong, here and in ``finish``.
        """
        self._session.copied.restart()
        await self._say(self._opening)
        await _answer(self._stream)
        missing, last = self._session.copied.take(), None
        while not self._offer.chunks.is_one(missing) and (last is None or len(missing) < last):
            await self._send(missing)
            missing, last = self._session.copied.take(), len(missing)
        self._session.copied.give_back(missing)

    async def finish(self) -> SessionMoved:
        """Send the rest, while no step is under way; where the session goes on."""
        await self._send(self._session.copied.take())
        await self._say(pack_end(self._session.position, self._seal.digest))
        try:
            ticket = unpack_text((await _answer(self._stream)).metadata, "ticket")
        except BadRequest as error:
            raise RemoteFailure(self._stream.peer, f"answered nonsense: {error.message}") from error
        return SessionMoved(self._stream.peer, ticket)

    async def _send(self, tokens: range) -> None:
        try:
            for place in self._offer.chunks.places(tokens):
                if self._stream.has_arrived:  # nothing but a refusal can have
                    await _answer(self._stream)
                keys, values = await self._session.read_kv(place)
                await self._say(await off_loop(2 * keys.nbytes, self._pack, place, (keys, values)))
        except RolledBack:
            self._session.copied.give_back(tokens)

    async def _say(self, message: runtime_pb2.ExpertRequest) -> None:
        try:
            async with asyncio.timeout(_OFFER_S):
                await self._stream.send(message)
        except TimeoutError:
            raise RemoteFailure(self._stream.peer, f"did not read for {_OFFER_S:g} s") from None

    def _pack(self, place: Place, chunk: KeysValues) -> runtime_pb2.ExpertRequest:
        message = pack_chunk(place, chunk)
        self._seal.add(message)
        return message


async def _answer(stream: MessageStream) -> runtime_pb2.ExpertResponse:
    try:
        reply = await stream.receive(runtime_pb2.ExpertResponse, _OFFER_S)
    except TimeoutError:
        raise RemoteFailure(stream.peer, f"did not answer the hand-over within {_OFFER_S:g} s") from None
    except (BadRequest, Overloaded) as error:
        raise RemoteFailure(stream.peer, f"answered what cannot be read: {error.message}") from error
    if reply is None:
        raise RemoteFailure(stream.peer, "ended the hand-over without a word")
    return reply


class Parting:
    """The last errand of a session here: the rest of its hand-over."""

    def __init__(self, hand_over: HandOver) -> None:
        self._hand_over = hand_over
        self.moved: asyncio.Future[SessionMoved] = asyncio.get_running_loop().create_future()

    async def __call__(self, session: Session) -> None:
        """Raises SessionMoved, for the client; returns when the session stays."""
        if self.moved.done():  # nobody waits any more
            return
        try:
            moved = await self._hand_over.finish()
            if not self.moved.done():
                self.moved.set_result(moved)
        except PetalsdError as error:
            if not self.moved.done():
                self.moved.set_exception(error)
            return
        finally:
            self.drop()
        raise moved

    def drop(self) -> None:
        if not self.moved.done():
            self.moved.set_exception(SessionClosed("the session is over"))


class SessionGiver:
    """Moves sessions to servers of ``view``, a few at once, within ``deadline_s`` for each."""

    def __init__(
        self,
        view: SwarmView,
        own_peer: str,
        connect: Callable[[str], ServerStub],
        model: ServedModel,
        deadline_s: float,
        refusals: Refusals,
    ) -> None:
        self._view = view
        self._own_peer = own_peer
        self._connect = connect
        self._model = model
        self._deadline_s = deadline_s
        self._refusals = refusals
        self._turns = asyncio.Semaphore(_MAX_AT_ONCE)

    async def move(self, session: Session, send_on: Callable[[Errand], None]) -> bool:
        """Whether the session has moved; otherwise it is over, or stays as it was.

        ``send_on`` has its own task do an errand between two steps.
        """
        span = str(session.spec.span)
        try:
            moved = await self._carry(session, send_on)
        except PetalsdError as error:
            if session.end_reason is None:
                log.info("session_stays", span=span, error=error.message)
            return False
        log.info("session_handed_over", taker=moved.peer, span=span, position=session.position)
        return True

    async def _carry(self, session: Session, send_on: Callable[[Errand], None]) -> SessionMoved:
        """Raises the last taker's error, SwarmError when there is nobody to ask, or the session's own."""
        error: PetalsdError = SwarmError(f"no other server of petalsd serves blocks {session.spec.span}")
        async with self._turns:
            for remote in self._candidates(session.spec):
                try:
                    async with asyncio.timeout(self._deadline_s):
                        return await self._give(session, self._connect(remote.peer), send_on)
                except TimeoutError:
                    error = RemoteFailure(
                        remote.peer, f"did not take the session within {self._deadline_s:g} s"
                    )
                except ValueError:  # a record under what is no PeerID
                    self._refusals.note(remote.peer)
                    continue
                except (SwarmError, DeadlineExceeded) as failure:
                    error = failure
                self._refusals.note(remote.peer)
                log.info("hand_over_refused", taker=remote.peer, error=error.message)
        raise error

    def _candidates(self, spec: SessionSpec) -> Sequence[RemoteSpan]:
        return takers(self._view, self._own_peer, spec, self._refusals)[:_MAX_ATTEMPTS]

    async def _give(
        self, session: Session, stub: ServerStub, send_on: Callable[[Errand], None]
    ) -> SessionMoved:
        stream = await stub.open_hand_over()
        try:
            hand_over = HandOver(session, stream, self._model)
            await hand_over.copy()
            parting = Parting(hand_over)
            send_on(parting)
            return await parting.moved
        finally:
            stream.abort()  # what a taker has not read is of no use any more
