"""The server's side of the wire: every call that stock clients make, under exactly the names they dial."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import structlog
from google.protobuf.message import Message
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2

from petalsd.errors import PetalsdError, SessionClosed
from petalsd.swarm.directory import SwarmView, read_view
from petalsd.swarm.escrow import Amount
from petalsd.swarm.faults import CallFailed, wire_code, wire_text
from petalsd.swarm.frames import take_over
from petalsd.swarm.givers import KnownGivers
from petalsd.swarm.inference_stream import InferenceCall
from petalsd.swarm.info import answer_info
from petalsd.swarm.node import Node
from petalsd.swarm.pass_calls import PassCalls
from petalsd.swarm.protocol import HAND_OVER_METHOD, HAND_OVER_SERVICE, handle_name
from petalsd.swarm.push import Pusher
from petalsd.swarm.requests import PushRequest
from petalsd.swarm.serving import Serving
from petalsd.swarm.session_giver import Refusals, SessionGiver
from petalsd.swarm.session_taker import SessionTaker
from petalsd.swarm.sessions import SessionRegistry
from petalsd.swarm.stream import MessageStream, RemoteError, StreamEnded
from petalsd.swarm.stream_room import StreamRoom
from petalsd.swarm.stub import ServerStub
from petalsd.swarm.tickets import TicketOffice
from petalsd.swarm.unary_calls import add_unary_handler, counted_request
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

M = TypeVar("M", bound=Message)
StreamCall = Callable[[MessageStream], Awaitable[None]]

_STOP_TIMEOUT_S = 3.0
_TAKE = handle_name(HAND_OVER_METHOD, HAND_OVER_SERVICE)
_WORK = ("rpc_forward", "rpc_backward")  # of the unary calls: anybody may ask what is served, servers push
_FAREWELL_S = 0.5
_READ_S = 5.0  # givers wait for it
_MAX_TAKEN, _MAX_TAKEN_PER_PEER = 256, 64  # streams of givers, who need not be among the allowed clients
_MAX_REFUSED_PER_PEER = 64  # streams that are still being told why


class TransformerConnectionHandler:
    """Registers the calls with p2pd, bounds and counts them, and turns failures into answers."""

    def __init__(self, node: Node, serving: Serving) -> None:
        self._node = node
        self._serving = serving
        self._observer = serving.observer
        self._sessions = SessionRegistry()
        self._calls: set[InferenceCall] = set()
        self._tickets = TicketOffice(serving.limits.step_timeout_s, serving.observer)
        self._taker = SessionTaker(serving, KnownGivers(self._read_view), self._tickets)
        self._refusals = Refusals()
        self.pusher = Pusher(node, serving.model.prefix, serving.limits.push_timeout_s, serving.observer)
        self._passes = PassCalls(serving, node.options.max_message_bytes)
        self._streams: set[asyncio.Task[None]] = set()
        self._room = StreamRoom(serving.limits.max_streams, serving.limits.max_streams_per_peer)
        self._taking_room = StreamRoom(_MAX_TAKEN, _MAX_TAKEN_PER_PEER)
        self._refused: Counter[str] = Counter()
        self._ending: PetalsdError | None = None

    async def start(self) -> None:
        """Answer calls from now on."""
        p2p = self._node.p2p
        self._ending = None
        for method, call, request_type in (
            ("rpc_info", self.rpc_info, runtime_pb2.ExpertUID),
            ("rpc_forward", self.rpc_forward, runtime_pb2.ExpertRequest),
            ("rpc_backward", self.rpc_backward, runtime_pb2.ExpertRequest),
            ("rpc_push", self.rpc_push, runtime_pb2.ExpertRequest),
        ):
            answer = self._unary_handler(method, call, request_type)
            await add_unary_handler(p2p, handle_name(method), answer)
        for method, streamed in (
            ("rpc_forward_stream", self.rpc_forward_stream),
            ("rpc_backward_stream", self.rpc_backward_stream),
            ("rpc_inference", self.rpc_inference),
        ):
            await p2p.add_binary_stream_handler(handle_name(method), self._stream_handler(method, streamed))
        taking = self._stream_handler(HAND_OVER_METHOD, self.rpc_take)
        await p2p.add_binary_stream_handler(_TAKE, taking)

    async def stop(self, reason: str = "the server stops") -> None:
        """End all open streams and answer no more calls.

        Streams whose session has ended are telling their clients why; the others get SessionClosed(reason), as far
        as they read what they are told.
        """
        self._ending = SessionClosed(reason, hint="use another server")
        tasks = list(self._streams)
        if tasks:
            await asyncio.wait(tasks, timeout=_FAREWELL_S)
        for task in tasks:
            task.cancel()
        if tasks:
            _, deaf = await asyncio.wait(tasks, timeout=_STOP_TIMEOUT_S)
            for task in deaf:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tickets.close(reason)
        await self.pusher.stop()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._unregister()
        except Exception as error:  # p2pd may be gone already, and with it the registrations
            log.debug("unregister_failed", error=repr(error))

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def awaited(self) -> Amount:
        """Of sessions that other servers handed to us and whose clients have not come yet."""
        return self._taker.escrow.held

    # ----------------------------------------------------------------------------------- unary calls

    async def rpc_info(self, request: runtime_pb2.ExpertUID, peer: str) -> runtime_pb2.ExpertInfo:
        """Facts and schemas."""
        return answer_info(self._serving, request.uid, self._node.options.client_mode)

    async def rpc_forward(self, request: runtime_pb2.ExpertRequest, peer: str) -> runtime_pb2.ExpertResponse:
        """A small forward pass."""
        return self._passes.whole(await self._passes.forward(request, peer))

    async def rpc_backward(self, request: runtime_pb2.ExpertRequest, peer: str) -> runtime_pb2.ExpertResponse:
        """A small backward pass."""
        return self._passes.whole(await self._passes.backward(request, peer))

    async def rpc_push(self, request: runtime_pb2.ExpertRequest, peer: str) -> runtime_pb2.ExpertResponse:
        """A step from the server before us; one for a session that is not (or no longer) here is ignored."""
        pushed = PushRequest.parse(request, self._serving.model.prefix)
        self._sessions.deliver(pushed.session_id, pushed.span, pushed.message, peer)
        return runtime_pb2.ExpertResponse()

    # ---------------------------------------------------------------------------------- stream calls

    async def rpc_forward_stream(self, stream: MessageStream) -> None:
        """A forward pass of any size."""
        async with asyncio.timeout(self._serving.limits.request_timeout_s):
            request = await self._passes.collect(stream)
            await self._passes.answer(stream, await self._passes.forward(request, stream.peer))

    async def rpc_backward_stream(self, stream: MessageStream) -> None:
        """A backward pass of any size."""
        async with asyncio.timeout(self._serving.limits.request_timeout_s):
            request = await self._passes.collect(stream)
            await self._passes.answer(stream, await self._passes.backward(request, stream.peer))

    async def rpc_inference(self, stream: MessageStream) -> None:
        """A session."""
        call = InferenceCall(stream, self._serving, self._sessions, self.pusher, self._tickets)
        self._calls.add(call)
        try:
            await call.run()
        finally:
            self._calls.remove(call)

    async def rpc_take(self, stream: MessageStream) -> None:
        """A session that another server of petalsd hands to us."""
        async with asyncio.timeout(self._serving.limits.request_timeout_s):
            await self._taker.take(stream)

    # -------------------------------------------------------------------------------------- hand-over

    async def hand_over(self, view: SwarmView, kept: BlockSpan | None, deadline_s: float) -> int:
        """Have sessions that use other blocks than ``kept`` (None: all) go on at servers of ``view``; how many do.

        Each is copied beside its steps, and goes between two of them. One that nobody takes, or whose client could
        not follow, stays here, as it was. Those that wait for their clients do so for a little while only.
        """
        self._tickets.hasten(kept)
        giver = SessionGiver(
            view,
            self._node.peer_id,
            partial(ServerStub, self._node),
            self._serving.model,
            deadline_s,
            self._refusals,
        )
        moves = [
            asyncio.create_task(giver.move(call.movable, call.send_on), name="move of a session")
            for call in self._calls
            if call.movable and not (kept and kept.covers(call.movable.spec.span))
        ]
        if not moves:
            return 0
        try:
            done, unfinished = await asyncio.wait(moves, timeout=deadline_s)
        finally:
            for move in moves:
                move.cancel()
            await asyncio.gather(*moves, return_exceptions=True)
        if unfinished:
            log.info("hand_over_unfinished", sessions=len(unfinished))
        return sum(move.result() for move in done)

    async def _read_view(self) -> SwarmView:
        model = self._serving.model
        return await read_view(self._node, model.prefix, model.num_blocks, _READ_S)

    # ------------------------------------------------------------------------------------- machinery

    def _unary_handler(
        self, method: str, call: Callable[[M, str], Awaitable[Message]], request_type: type[M]
    ) -> Callable[[bytes, str], Awaitable[bytes]]:
        async def answer(payload: bytes, peer: str) -> bytes:
            self._observer.call_began(method)
            self._observer.received(len(payload))
            try:
                if method in _WORK:
                    self._serving.check_allowed(peer)
                with counted_request(payload, request_type, self._node.budget.share_of(peer)) as request:
                    async with asyncio.timeout(self._serving.limits.request_timeout_s):
                        reply: bytes = (await call(request, peer)).SerializeToString()
            except Exception as error:
                self._observer.call_failed(method, wire_code(error))
                raise CallFailed(wire_text(error, method, peer)) from None
            self._observer.sent(len(reply))
            return reply

        return answer

    def _stream_handler(
        self, method: str, call: StreamCall
    ) -> Callable[[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def handle(
            info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            peer, timeout_s = info.peer_id.to_base58(), self._serving.limits.request_timeout_s
            frames = take_over(reader, writer, self._node.budget.share_of(peer))
            stream = MessageStream(peer, frames, timeout_s, self._observer)
            task = asyncio.current_task()
            if task is None:
                return stream.close()
            self._streams.add(task)
            try:
                await self._admit(method, call, stream)
            finally:
                stream.close()
                self._streams.remove(task)

        return handle

    async def _admit(self, method: str, call: StreamCall, stream: MessageStream) -> None:
        """Serve the stream if its peer may have it here."""
        self._observer.call_began(method)
        is_giver = method == HAND_OVER_METHOD
        with contextlib.ExitStack() as stack:
            try:
                if self._ending is not None:
                    raise self._ending
                if not is_giver:
                    self._serving.check_allowed(stream.peer)
                room = self._taking_room if is_giver else self._room
                stack.enter_context(room.hold(stream.peer))
            except PetalsdError as error:
                await self._refuse(method, stream, error)
            else:
                await self._serve(method, call, stream)

    async def _refuse(self, method: str, stream: MessageStream, error: PetalsdError) -> None:
        """Say why; to a peer that is told the same many times already by closing the stream."""
        peer = stream.peer
        if self._refused[peer] >= _MAX_REFUSED_PER_PEER:
            self._observer.call_failed(method, wire_code(error))
            return stream.abort()
        self._refused[peer] += 1
        try:
            await self._fail(method, stream, error)
        finally:
            self._refused[peer] -= 1
            if not self._refused[peer]:
                del self._refused[peer]

    async def _serve(self, method: str, call: StreamCall, stream: MessageStream) -> None:
        """Run one stream call; its failure is sent before the close, for a silent close hangs stock clients."""
        try:
            await call(stream)
        except (StreamEnded, RemoteError) as error:  # the latter: it failed, and says so
            log.debug("stream_abandoned", method=method, peer=stream.peer, error=error.message[:200])
            self._observer.call_abandoned(method)
            return
        except asyncio.CancelledError:
            if self._ending is None:
                raise
            await self._fail(method, stream, self._ending)
        except Exception as error:
            await self._fail(method, stream, error)
        else:
            await stream.finish()

    async def _fail(self, method: str, stream: MessageStream, error: BaseException) -> None:
        text = wire_text(error, method, stream.peer)
        self._observer.call_failed(method, wire_code(error))
        try:
            await stream.send_error(text)
        except PetalsdError:
            return  # the peer is gone, nobody is left to tell
        except asyncio.CancelledError:  # it does not read, and the server cannot wait any longer
            stream.abort()
            raise
        await stream.close_after_peer()

    async def _unregister(self) -> None:
        p2p = self._node.p2p
        for method in ("rpc_info", "rpc_forward", "rpc_backward", "rpc_push"):
            await p2p.remove_protobuf_handler(handle_name(method))
        await p2p.remove_binary_stream_handler(_TAKE)
        for method in ("rpc_forward_stream", "rpc_backward_stream", "rpc_inference"):
            await p2p.remove_binary_stream_handler(handle_name(method))
