"""The client's side as stock Petals has it: hivemind's own stubs, streams and serializers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, AsyncIterator  # noqa: UP035  # hivemind knows a stream by the alias of typing

import torch
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p import P2PContext, PeerID, ServicerBase
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from petalsd.swarm.node import Node

Request, Response = runtime_pb2.ExpertRequest, runtime_pb2.ExpertResponse
DUMMY, DUMMY_INT64 = torch.empty(0), torch.empty(0, dtype=torch.int64)
TIMEOUT_S = 20.0


class TransformerConnectionHandler(ServicerBase):
    """The reference's handler as its stubs see it: class name, method names and annotations are the wire."""

    async def rpc_info(
        self, request: runtime_pb2.ExpertUID, context: P2PContext
    ) -> runtime_pb2.ExpertInfo: ...

    async def rpc_forward(self, request: Request, context: P2PContext) -> Response: ...

    async def rpc_backward(self, request: Request, context: P2PContext) -> Response: ...

    async def rpc_push(self, request: Request, context: P2PContext) -> Response: ...

    async def rpc_forward_stream(
        self, requests: AsyncIterator[Request], context: P2PContext
    ) -> AsyncIterator[Request]: ...

    async def rpc_backward_stream(
        self, requests: AsyncIterator[Request], context: P2PContext
    ) -> AsyncIterator[Response]: ...

    async def rpc_inference(
        self, requests: AsyncIterator[Request], context: P2PContext
    ) -> AsyncIterator[Response]: ...


def stock_stub(node: Node, peer: str) -> Any:
    return TransformerConnectionHandler.get_stub(node.p2p, PeerID.from_base58(peer))


def stock_request(uid: str, tensors: Sequence[torch.Tensor], metadata: Mapping[str, Any]) -> Request:
    """As stock clients build it; tensors travel in hivemind's encoding."""
    structure = (tuple(b"__T%d" % index for index in range(len(tensors))), {})
    return Request(
        uid=uid,
        tensors=[serialize_torch_tensor(tensor) for tensor in tensors],
        metadata=MSGPackSerializer.dumps({"args_structure": structure, **metadata}),
    )


def decoded(response: Response) -> list[torch.Tensor]:
    return [deserialize_torch_tensor(tensor) for tensor in response.tensors]


class StockSession:
    """One ``rpc_inference`` stream fed from a queue, as the reference's client does it."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self._queue: asyncio.Queue[Request] = asyncio.Queue()
        self.answers: AsyncIterator[Response]

    async def open(self) -> StockSession:
        self.answers = await self._stub.rpc_inference(self._requests())
        return self

    def put(self, uid: str, tensors: Sequence[torch.Tensor], metadata: Mapping[str, Any]) -> None:
        self._queue.put_nowait(stock_request(uid, tensors, metadata))

    async def answer(self) -> torch.Tensor:
        """The next answer's only tensor; StopAsyncIteration when the server closed."""
        response = await asyncio.wait_for(anext(self.answers), TIMEOUT_S)
        (tensor,) = decoded(response)
        return tensor

    async def step(
        self,
        uid: str,
        hidden: torch.Tensor,
        prompts: torch.Tensor = DUMMY,
        hypo_ids: torch.Tensor = DUMMY_INT64,
        **metadata: Any,
    ) -> torch.Tensor:
        self.put(uid, [hidden, prompts, hypo_ids], metadata)
        return await self.answer()

    async def end(self) -> bool:
        """The empty message that ends a session; whether the server then closed without an error."""
        self._queue.put_nowait(Request())
        try:
            await asyncio.wait_for(anext(self.answers), TIMEOUT_S)
        except StopAsyncIteration:
            return True
        return False

    async def _requests(self) -> AsyncIterator[Request]:
        while True:
            request = await asyncio.wait_for(self._queue.get(), TIMEOUT_S)
            yield request
            if not request.uid and not request.tensors:
                return
