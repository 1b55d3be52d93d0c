"""The smallest client of the wire, and its opposite: an echo. Both sides use hivemind and a real p2pd each.

All providers are driven by this one client, so that differences between them are differences between servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from dataclasses import dataclass
from typing import AsyncIterator  # noqa: UP035 - hivemind knows a stream by typing's own alias

import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from petalsd.swarm.p2pd import P2PDaemon, P2PDOptions

STEP_TIMEOUT_S = 120.0

_NO_PROMPTS = serialize_torch_tensor(torch.empty(0))
_NO_HYPO_IDS = serialize_torch_tensor(torch.empty(0, dtype=torch.int64))


class TransformerConnectionHandler(ServicerBase):
    """Named as on the wire. As a servicer it answers each step with the step's own tensor."""

    async def rpc_inference(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        async for request in requests:
            if not request.tensors:
                return
            yield runtime_pb2.ExpertResponse(tensors=request.tensors[:1])


class StepStream:
    """One inference session: ``open``, then ``step`` after ``step``, then ``close``."""

    def __init__(self, p2p: P2P, peer_id: PeerID, uid: str, max_length: int) -> None:
        self._stub = TransformerConnectionHandler.get_stub(p2p, peer_id)
        self._uid = uid
        self._metadata = {
            "session_id": str(uuid.uuid4()),
            "max_length": max_length,
            "points": 0.0,
            "active_adapter": "",
            "args_structure": ((b"__T0", b"__T1", b"__T2"), {}),
        }
        self._requests: asyncio.Queue[runtime_pb2.ExpertRequest | None] = asyncio.Queue()
        self._answers: AsyncIterator[runtime_pb2.ExpertResponse] | None = None

    async def open(self) -> None:
        self._answers = await asyncio.wait_for(self._stub.rpc_inference(self._feed()), STEP_TIMEOUT_S)

    async def step(self, hidden: torch.Tensor) -> runtime_pb2.Tensor:
        """Send ``[1, n, M]`` and wait for the answer, left as it came."""
        assert self._answers is not None
        metadata = MSGPackSerializer.dumps({**self._metadata, "step_id": str(uuid.uuid4())})
        tensors = [serialize_torch_tensor(hidden), _NO_PROMPTS, _NO_HYPO_IDS]
        self._requests.put_nowait(
            runtime_pb2.ExpertRequest(uid=self._uid, tensors=tensors, metadata=metadata)
        )
        answer = await asyncio.wait_for(anext(self._answers), STEP_TIMEOUT_S)
        return answer.tensors[0]

    async def close(self) -> None:
        """End the session as clients do: an empty message, then the end of the stream.

        A server that closes at the first may break the pipe under the second.
        """
        assert self._answers is not None
        self._requests.put_nowait(runtime_pb2.ExpertRequest())
        self._requests.put_nowait(None)
        with contextlib.suppress(StopAsyncIteration, OSError):
            await asyncio.wait_for(anext(self._answers), STEP_TIMEOUT_S)

    async def _feed(self) -> AsyncIterator[runtime_pb2.ExpertRequest]:
        while (request := await self._requests.get()) is not None:
            yield request


@dataclass(frozen=True, slots=True)
class Connection:
    """A p2pd of our own that knows one server."""

    p2p: P2P
    peer_id: PeerID

    @contextlib.asynccontextmanager
    async def stream(self, uid: str, max_length: int) -> AsyncIterator[StepStream]:
        """One session, closed at the end."""
        stream = StepStream(self.p2p, self.peer_id, uid, max_length)
        await stream.open()
        try:
            yield stream
        finally:
            await stream.close()


@contextlib.asynccontextmanager
async def connect(maddr: str) -> AsyncIterator[Connection]:
    """Start a p2pd that dials the server at ``maddr``, as a client's does."""
    daemon = P2PDaemon(P2PDOptions(initial_peers=[maddr], client_mode=True, listen=False, use_relay=False))
    try:
        yield Connection(await daemon.start(), PeerID.from_base58(maddr.rsplit("/p2p/", 1)[1]))
    finally:
        await daemon.stop()


async def time_first_token(connection: Connection, uid: str, hidden: torch.Tensor) -> float:
    """Milliseconds from opening a session to the answer to its prompt ``[1, n, M]``."""
    started = time.perf_counter()
    async with connection.stream(uid, hidden.shape[1] + 1) as stream:
        await stream.step(hidden)
        return (time.perf_counter() - started) * 1e3


async def time_step(stream: StepStream, hidden_size: int, tokens: int) -> float:
    """Milliseconds from handing in a step of ``tokens`` random states to having its answer."""
    hidden = torch.randn(1, tokens, hidden_size)
    started = time.perf_counter()
    await stream.step(hidden)
    return (time.perf_counter() - started) * 1e3
