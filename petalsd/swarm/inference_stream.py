"""One ``rpc_inference`` call: open a session, answer its steps one by one, give its pages back on every path."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict

import structlog
from hivemind.proto import runtime_pb2

from petalsd.alarm import Alarm
from petalsd.engine.handle import Session
from petalsd.errors import BadRequest, DeadlineExceeded, SessionClosed
from petalsd.swarm.codec import arrange, encode_tensor, unpacked_bytes
from petalsd.swarm.off_loop import off_loop
from petalsd.swarm.prefixed_session import PrefixedSession
from petalsd.swarm.push import Pusher
from petalsd.swarm.requests import OpenRequest, StepMessage, decode_step
from petalsd.swarm.serving import Serving
from petalsd.swarm.sessions import Errand, SessionRegistry, StepInbox
from petalsd.swarm.stream import MessageStream
from petalsd.swarm.tickets import TicketOffice

log = structlog.get_logger(__name__)

_MAX_STEP_IDS = 1024
_MAX_REPEATED = 64  # steps of a client in a row that are answered already; it sends each pushed one once, too


class InferenceCall:
    """The server's side of one stream: ``run`` returns when the client has ended it, and else raises.

    ``movable``: its session, once it is open and when the client could follow it to another server.
    """

    def __init__(
        self,
        stream: MessageStream,
        serving: Serving,
        sessions: SessionRegistry,
        pusher: Pusher,
        tickets: TicketOffice,
    ) -> None:
        self._stream = stream
        self._serving = serving
        self._sessions = sessions
        self._pusher = pusher
        self._tickets = tickets
        self._inbox = StepInbox(stream.keep_more)
        self._patience = Alarm(self._lose_patience)
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._step_ids: OrderedDict[str, None] = OrderedDict()
        self._num_repeated = 0
        self._asked_at: float | None = None
        # Referred to from here alone: a prompt is large, and its session lives long.
        self._at_work: StepMessage | Errand | None = None
        self.movable: Session | None = None

    def send_on(self, errand: Errand) -> None:
        """Have an open session do ``errand`` before its next step."""
        self._inbox.send_on(errand)

    async def run(self) -> None:
        """Serve until the end; a client that closes or dies ends the session at once, also in mid-step."""
        worker = asyncio.create_task(self._work(), name="inference worker")
        self._stream.when_arrived(self._take_in)
        self._take_in()
        try:
            await asyncio.wait({self._broken, worker}, return_when=asyncio.FIRST_COMPLETED)
            await (worker if worker.done() else self._broken)
        finally:
            self._stream.when_arrived(None)
            self._patience.close()
            worker.cancel()
            self._broken.cancel()
            await asyncio.gather(self._broken, worker, return_exceptions=True)
            self._inbox.close()

    def _take_in(self) -> None:
        """Take the client's messages off the stream, as far as there is room for them."""
        try:
            while self._inbox.has_room and self._stream.has_arrived:
                request = self._stream.take(runtime_pb2.ExpertRequest)
                if request is None or not request.tensors:
                    return self._inbox.end()
                kept_bytes = self._stream.keep(unpacked_bytes(request.tensors))
                self._inbox.put(StepMessage.parse(request, kept_bytes=kept_bytes))
        except Exception as error:  # for ``run``; here the loop would hear of it
            if not self._broken.done():
                self._broken.set_exception(error)

    async def _work(self) -> None:
        limit_s = self._serving.limits.session_timeout_s
        deadline = asyncio.timeout(limit_s)
        try:
            async with deadline:
                await self._session()
        except TimeoutError:
            if not deadline.expired():
                raise
            raise DeadlineExceeded(f"the session lasted {limit_s:g} s, longer than is allowed") from None

    async def _session(self) -> None:
        await self._next()
        if not isinstance(self._at_work, StepMessage):  # no errand comes before the session is open
            return
        self._asked_at = time.monotonic()
        serving = self._serving
        opening = OpenRequest.parse(
            self._at_work, serving.model.prefix, self._stream.peer, serving.limits.max_alloc_timeout_s
        )
        with self._sessions.claim(opening.session_id, self._inbox):
            session = await self._open(opening)
            try:
                log.debug("session_opened", peer=self._stream.peer, span=str(opening.spec.span))
                self._inbox.span = opening.spec.span
                self.movable = session if opening.can_follow else None
                session.when_ended(lambda reason: self._inbox.fail(SessionClosed(reason)))
                prefixed = PrefixedSession(session, self._serving.prefixes, self._serving.observer)
                await self._steps(prefixed, opening.structure)
            finally:
                await session.close()
                log.debug("session_closed", peer=self._stream.peer, position=session.position)

    async def _open(self, opening: OpenRequest) -> Session:
        """A session that was handed to us was admitted already."""
        if opening.ticket is not None:
            return self._tickets.claim(opening.ticket, opening.spec)
        self._serving.check_open(opening.spec.peer)
        return await self._serving.engine.open_session(opening.spec)

    async def _steps(self, prefixed: PrefixedSession, structure: object) -> None:
        try:
            while self._at_work is not None:
                await self._work_on(self._at_work, prefixed, structure)
                await self._next()
            await prefixed.finish()
        finally:
            prefixed.stop()

    async def _work_on(
        self, work: StepMessage | Errand, prefixed: PrefixedSession, structure: object
    ) -> None:
        if not isinstance(work, StepMessage):
            await work(prefixed.session)
        elif work.step_id is None or work.step_id not in self._step_ids:
            self._num_repeated = 0
            await self._step(prefixed, structure, work)
        else:
            await self._skip(work)

    async def _skip(self, message: StepMessage) -> None:
        """It is answered already; others have their turn, also while one after the other has arrived."""
        self._num_repeated += not message.is_pushed
        if self._num_repeated > _MAX_REPEATED:
            rule = f"{self._num_repeated} steps in a row are answered already"
            raise BadRequest("step_id", message.step_id, rule)
        await asyncio.sleep(0)

    async def _step(self, prefixed: PrefixedSession, structure: object, message: StepMessage) -> None:
        session = prefixed.session
        try:
            tensors = arrange(message.tensors, structure, 3)
            start = session.position if message.start is None else message.start
            step = await off_loop(message.num_bytes, decode_step, tensors, start, session.check)
            answer = await prefixed.step(step)
        except BadRequest as error:
            if not message.is_pushed:
                raise
            # The session is as it was, and the client's own message for this step is still to come.
            log.info("bad_push", peer=self._stream.peer, error=str(error))
            return
        self._remember(message.step_id)
        output = await off_loop(answer.nbytes, encode_tensor, answer)
        self._pusher.push(message, tensors[1:], output, self._stream.peer)
        await self._stream.send(runtime_pb2.ExpertResponse(tensors=[output]))
        if self._asked_at is not None:
            self._serving.observer.first_answer(time.monotonic() - self._asked_at)
            self._asked_at = None

    async def _next(self) -> None:
        """Let go of what is at work, and wait for what is next; None: there is no more."""
        if isinstance(self._at_work, StepMessage):
            self._stream.let_go(self._at_work.kept_bytes)
        self._at_work = None
        self._patience.set(self._serving.limits.step_timeout_s)
        try:
            self._at_work = await self._inbox.get()
        finally:
            self._patience.clear()
        self._take_in()

    def _lose_patience(self) -> None:
        limit_s = self._serving.limits.step_timeout_s
        self._inbox.fail(DeadlineExceeded(f"no step came for {limit_s:g} s"))

    def _remember(self, step_id: str | None) -> None:
        if step_id is None:
            return
        self._step_ids[step_id] = None
        if len(self._step_ids) > _MAX_STEP_IDS:
            self._step_ids.popitem(last=False)
