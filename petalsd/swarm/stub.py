"""Calling another server: every method has a deadline, and every failure is a RemoteFailure naming the peer."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from google.protobuf.message import Message
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2, runtime_pb2

from petalsd import errors
from petalsd.errors import BadRequest, RemoteFailure, SwarmError
from petalsd.swarm.codec import (
    TensorAssembler,
    decode_metadata,
    decode_tensor,
    encode_metadata,
    encode_tensor,
    split_for_stream,
)
from petalsd.swarm.frames import take_over
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import (
    HAND_OVER_METHOD,
    HAND_OVER_SERVICE,
    MAX_UNARY_BYTES,
    STREAM_ABOVE_BYTES,
    UNARY_ENVELOPE_BYTES,
    handle_name,
)
from petalsd.swarm.stream import MessageStream, NoAnswer, RemoteError, StreamEnded, parse_message

M = TypeVar("M", bound=Message)

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 180.0
_MAX_HAND_OVER_ANSWER_BYTES = 64 * 1024  # a ticket


class ServerStub:
    """The calls that one server answers. Tensors come back decoded, finite, on the CPU."""

    def __init__(self, node: Node, peer: str) -> None:
        self.peer = peer
        self._node = node
        self._peer_id = PeerID.from_base58(peer)

    async def is_silent(self, timeout_s: float) -> bool:
        """Whether it leaves a ping unanswered while others answer: a silence may be ours. Never raises."""
        try:
            is_heard = math.isfinite(await self._node.ping(self.peer, timeout_s))
            return not is_heard and await self._node.is_in_touch()
        except SwarmError:  # our own node is gone
            return False

    async def rpc_info(self, timeout_s: float = CONNECT_TIMEOUT_S) -> dict[str, Any]:
        """What the server says about itself."""
        reply = await self._unary("rpc_info", runtime_pb2.ExpertUID(), runtime_pb2.ExpertInfo, timeout_s)
        try:
            return decode_metadata(reply.serialized_info)
        except BadRequest as error:
            raise RemoteFailure(self.peer, f"rpc_info answered nonsense: {error.message}") from error

    async def forward(
        self,
        uid: str,
        tensors: Sequence[torch.Tensor],
        metadata: Mapping[str, object],
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> list[torch.Tensor]:
        """``tensors``: hidden ``[B, n, M]`` and prompts (or DUMMY) -> one tensor like hidden."""
        return await self._compute("rpc_forward", uid, tensors, metadata, timeout_s)

    async def backward(
        self,
        uid: str,
        tensors: Sequence[torch.Tensor],
        metadata: Mapping[str, object],
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> list[torch.Tensor]:
        """``tensors``: inputs, output gradients, prompts (or DUMMY) -> input gradients[, prompt gradients]."""
        return await self._compute("rpc_backward", uid, tensors, metadata, timeout_s)

    async def push(self, request: runtime_pb2.ExpertRequest, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        """Hand a step's output to the next server of a chain."""
        await self._unary("rpc_push", request, runtime_pb2.ExpertResponse, timeout_s)

    async def open_inference(
        self, connect_timeout_s: float = CONNECT_TIMEOUT_S, send_timeout_s: float = REQUEST_TIMEOUT_S
    ) -> InferenceStream:
        """Dial; nothing is sent yet."""
        stream = await self._dial(handle_name("rpc_inference"), connect_timeout_s, send_timeout_s)
        return InferenceStream(stream)

    async def open_hand_over(self) -> MessageStream:
        """Dial for a session that is to go on there; RemoteFailure of servers that take none."""
        name = handle_name(HAND_OVER_METHOD, HAND_OVER_SERVICE)
        return await self._dial(name, CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, _MAX_HAND_OVER_ANSWER_BYTES)

    async def _compute(
        self,
        method: str,
        uid: str,
        tensors: Sequence[torch.Tensor],
        metadata: Mapping[str, object],
        timeout_s: float,
    ) -> list[torch.Tensor]:
        parts = [encode_tensor(tensor) for tensor in tensors]
        packed = encode_metadata(metadata)
        if sum(len(part.buffer) for part in parts) > STREAM_ABOVE_BYTES:
            answer = await self._streamed(f"{method}_stream", uid, parts, packed, timeout_s)
        else:
            request = runtime_pb2.ExpertRequest(uid=uid, tensors=parts, metadata=packed)
            reply = await self._unary(method, request, runtime_pb2.ExpertResponse, timeout_s)
            answer = list(reply.tensors)
        return _decode(self.peer, answer)

    async def _unary(self, method: str, request: Message, reply_type: type[M], timeout_s: float) -> M:
        if request.ByteSize() > MAX_UNARY_BYTES - UNARY_ENVELOPE_BYTES:
            raise RemoteFailure(self.peer, f"{method} cannot carry {request.ByteSize()} bytes in one message")
        async with self._failures(method, timeout_s):
            payload: bytes = await self._node.p2p._client.call_unary_handler(
                self._peer_id, handle_name(method), request.SerializeToString()
            )
            return parse_message(reply_type, payload)

    async def _streamed(
        self, method: str, uid: str, tensors: Sequence[runtime_pb2.Tensor], metadata: bytes, timeout_s: float
    ) -> list[runtime_pb2.Tensor]:
        stream = await self._dial(handle_name(method), min(CONNECT_TIMEOUT_S, timeout_s), timeout_s)
        try:
            async with self._failures(method, timeout_s):
                parts = (part for tensor in tensors for part in split_for_stream(tensor))
                with contextlib.suppress(StreamEnded):  # a server that refuses early says why in its answer
                    for part in parts:
                        await stream.send(
                            runtime_pb2.ExpertRequest(uid=uid, tensors=[part], metadata=metadata)
                        )
                    await stream.send_end()
                return await self._collect(stream)
        finally:
            stream.close()

    async def _collect(self, stream: MessageStream) -> list[runtime_pb2.Tensor]:
        """All answers until the server closes: it sends no end mark, a close after whole tensors is the end."""
        assembler = TensorAssembler(self._node.options.max_message_bytes)
        while True:
            try:
                reply = await stream.receive(runtime_pb2.ExpertResponse)
            except StreamEnded:
                if tensors := assembler.finish():
                    return tensors
                raise
            if reply is None:
                raise RemoteError(self.peer, "failed without saying why")
            for part in reply.tensors:
                assembler.add(part)

    async def _dial(
        self, name: str, timeout_s: float, send_timeout_s: float, max_answer_bytes: int | None = None
    ) -> MessageStream:
        async with self._failures(f"connecting for {name}", timeout_s):
            reader, writer = await _open_stream(self._node.p2p, self._peer_id, name)
        budget = self._node.budget.share_of(self.peer, max_answer_bytes)
        return MessageStream(self.peer, take_over(reader, writer, budget), send_timeout_s)

    @contextlib.asynccontextmanager
    async def _failures(self, what: str, timeout_s: float) -> AsyncIterator[None]:
        """The deadline of one call, and its failures as RemoteFailure."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise RemoteFailure(self.peer, f"{what} took longer than {timeout_s:g} s") from None
        except P2PHandlerError as error:
            raise RemoteError(self.peer, str(error)) from error
        except (P2PDaemonError, OSError, EOFError) as error:
            raise RemoteFailure(self.peer, f"{what} failed: {error}") from error
        except (BadRequest, errors.Overloaded) as error:  # the latter: with more than we can hold
            raise RemoteFailure(self.peer, f"{what} was answered with nonsense: {error.message}") from error


class InferenceStream:
    """One inference session at one server: send a step, receive its answer, in this order."""

    def __init__(self, stream: MessageStream) -> None:
        self.peer = stream.peer
        self._stream = stream

    async def send(self, uid: str, tensors: Sequence[torch.Tensor], metadata: Mapping[str, object]) -> None:
        """One step: hidden, prompts, hypo_ids. The first message's uid names the blocks, later ones may be "".

        RemoteFailure when the server has ended the session, with the reason if it gave one.
        """
        self._heed()
        request = runtime_pb2.ExpertRequest(
            uid=uid,
            tensors=[encode_tensor(tensor) for tensor in tensors],
            metadata=encode_metadata(metadata),
        )
        try:
            await self._stream.send(request)
        except StreamEnded:
            self._heed()  # the reason may have come meanwhile
            raise
        except errors.DeadlineExceeded as error:
            raise RemoteFailure(self.peer, error.message) from error

    @property
    def has_arrived(self) -> bool:
        """Whether ``receive`` has something to say at once: an answer, perhaps to a pushed step, or an error."""
        return self._stream.has_arrived

    async def receive(self, timeout_s: float = REQUEST_TIMEOUT_S) -> list[torch.Tensor]:
        """The answer to the oldest step that has none yet; NoAnswer when none comes in time."""
        try:
            reply = await self._stream.receive(runtime_pb2.ExpertResponse, timeout_s)
        except TimeoutError:
            raise NoAnswer(self.peer, f"no answer within {timeout_s:g} s") from None
        except (BadRequest, errors.Overloaded) as error:
            raise RemoteFailure(self.peer, f"answered nonsense: {error.message}") from error
        if reply is None:
            raise RemoteError(self.peer, "failed without saying why")
        return _decode(self.peer, reply.tensors)

    def _heed(self) -> None:
        """Hear what the server said unasked: to write to a stream that it closed would lose the reason."""
        if not self._stream.has_arrived:
            return
        try:
            reply = self._stream.take(runtime_pb2.ExpertResponse)
        except (BadRequest, errors.Overloaded) as error:
            raise RemoteFailure(self.peer, f"answered nonsense: {error.message}") from error
        what = "failed without saying why" if reply is None else "answered a step that was never sent"
        raise RemoteError(self.peer, what)

    async def close(self) -> None:
        """End the session; the server frees its pages. Never raises, idempotent."""
        with contextlib.suppress(errors.PetalsdError):
            await self._stream.send(runtime_pb2.ExpertRequest())
            await self._stream.send_end()
            await self._stream.finish()
        self._stream.close()

    def abort(self) -> None:
        """Drop the stream at once, for a server that failed."""
        self._stream.close()


async def _open_stream(
    p2p: P2P, peer: PeerID, name: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask p2pd for a stream. As hivemind's own call, but a refusal or a cancellation leaves no socket behind."""
    reader, writer = await asyncio.open_unix_connection(p2p.daemon_listen_maddr["unix"])
    try:
        open_request = p2pd_pb2.StreamOpenRequest(peer=peer.to_bytes(), proto=[name])
        await write_pbmsg(
            writer, p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=open_request)
        )
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
        raise_if_failed(response)
    except BaseException:
        writer.close()
        raise
    return reader, writer


def _decode(peer: str, tensors: Sequence[runtime_pb2.Tensor]) -> list[torch.Tensor]:
    try:
        return [decode_tensor(tensor, f"answer[{index}]") for index, tensor in enumerate(tensors)]
    except BadRequest as error:
        raise RemoteFailure(peer, f"answered nonsense: {error.message}") from error
