"""``rpc_forward`` and ``rpc_backward``, whole in one message or streamed in parts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import torch
from hivemind.proto import runtime_pb2

from petalsd.engine.step import PassRequest
from petalsd.errors import BadRequest
from petalsd.swarm.codec import TensorAssembler, decode_metadata, encode_tensor, split_for_stream
from petalsd.swarm.off_loop import off_loop
from petalsd.swarm.protocol import MAX_UNARY_BYTES, UNARY_ENVELOPE_BYTES
from petalsd.swarm.requests import decode_backward, decode_forward, served_span
from petalsd.swarm.serving import Serving
from petalsd.swarm.stream import MessageStream


class PassCalls:
    """Passes through the served blocks. Unary or streamed, ``forward`` and ``backward`` are the same work."""

    def __init__(self, serving: Serving, max_request_bytes: int) -> None:
        self._serving = serving
        self._max_request_bytes = max_request_bytes

    async def forward(self, request: runtime_pb2.ExpertRequest, peer: str) -> list[runtime_pb2.Tensor]:
        """hidden, prompts -> the last block's output."""
        output = await self._serving.engine.forward(await self._decode(decode_forward, request, peer))
        return await self._encode([output])

    async def backward(self, request: runtime_pb2.ExpertRequest, peer: str) -> list[runtime_pb2.Tensor]:
        """inputs, output gradients, prompts -> input gradients and, when prompts came, theirs."""
        asked = self._decode(decode_backward, request, peer)
        inputs, prompts = await self._serving.engine.backward(await asked)
        return await self._encode([inputs] if prompts is None else [inputs, prompts])

    async def collect(self, stream: MessageStream) -> runtime_pb2.ExpertRequest:
        """Put a streamed request together; the first part's metadata counts, all parts name the same blocks.

        What came counts against the budget until the stream is closed, compressed tensors as what they become.
        """
        self._serving.check_open(stream.peer)
        assembler = TensorAssembler(self._max_request_bytes)
        first: runtime_pb2.ExpertRequest | None = None
        while (part := await stream.receive(runtime_pb2.ExpertRequest)) is not None:
            if first is None:
                first = runtime_pb2.ExpertRequest(uid=part.uid, metadata=part.metadata)
                served_span(first.uid, self._serving.model.prefix)
            elif part.uid != first.uid:
                raise BadRequest(
                    "uid", part.uid, f"all parts of a request name the same blocks, {first.uid[:60]!r}"
                )
            if not part.tensors:
                raise BadRequest("tensors", "0 of them", "each part of a request brings some")
            stream.keep(max(part.ByteSize(), sum(map(assembler.add, part.tensors))))
            await asyncio.sleep(0)  # others have their turn, also while one part after the other has arrived
        if first is None:
            raise BadRequest("tensors", "0 messages", "the request is empty")
        first.tensors.extend(assembler.finish())
        return first

    async def answer(self, stream: MessageStream, tensors: Sequence[runtime_pb2.Tensor]) -> None:
        """Send the answer in parts; the stream's close marks its end."""
        for tensor in tensors:
            for part in split_for_stream(tensor):
                await stream.send(runtime_pb2.ExpertResponse(tensors=[part]))

    def whole(self, tensors: Sequence[runtime_pb2.Tensor]) -> runtime_pb2.ExpertResponse:
        """The answer in one message. One that p2pd would drop is refused, or the caller would wait in vain."""
        response = runtime_pb2.ExpertResponse(tensors=tensors)
        size, limit = response.ByteSize(), MAX_UNARY_BYTES - UNARY_ENVELOPE_BYTES
        if size > limit:
            rule = f"the answer needs {size} bytes, one message holds {limit}: use the streamed call"
            raise BadRequest("tensors", f"{len(tensors)} of them", rule)
        return response

    async def _decode(
        self, decode: Callable[..., PassRequest], request: runtime_pb2.ExpertRequest, peer: str
    ) -> PassRequest:
        self._serving.check_open(peer)
        span = served_span(request.uid, self._serving.model.prefix)
        metadata = decode_metadata(request.metadata)
        check = self._serving.engine.check_pass
        return await off_loop(request.ByteSize(), decode, request.tensors, metadata, span, peer, check)

    async def _encode(self, tensors: Sequence[torch.Tensor]) -> list[runtime_pb2.Tensor]:
        return [await off_loop(tensor.nbytes, encode_tensor, tensor) for tensor in tensors]
