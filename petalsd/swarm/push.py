"""Handing a step's output to the next server of a chain, so that it need not wait for the client."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import structlog
from hivemind.proto import runtime_pb2

from petalsd.errors import PetalsdError, RemoteFailure
from petalsd.swarm.codec import encode_metadata
from petalsd.swarm.node import Node
from petalsd.swarm.observer import SwarmObserver
from petalsd.swarm.protocol import MAX_UNARY_BYTES, UNARY_ENVELOPE_BYTES, make_chain
from petalsd.swarm.requests import StepMessage
from petalsd.swarm.stream import RemoteError
from petalsd.swarm.stub import ServerStub

log = structlog.get_logger(__name__)

_MAX_UNDER_WAY = 256
_MAX_PER_PEER = 64  # one that hangs holds up the pushes to no other
_MAX_PER_CLIENT = 64  # it may name as many peers that hang as it likes
_STALL_S = 1.0  # a push is answered within a round trip
_PAUSE_S = 30.0
_MAX_FAILED = 256


class Pusher:
    """Pushes in the background. A push that fails costs nothing: the client sends the same step.

    A peer that leaves a push unanswered for a second gets no more meanwhile. After one that did not arrive it gets
    none for a while, and then one at a time until one arrives.
    """

    def __init__(
        self,
        node: Node,
        prefix: str,
        timeout_s: float,
        observer: SwarmObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._observer = observer
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._per_peer: dict[str, dict[asyncio.Task[None], float]] = {}  # with the times when they began
        self._per_client: Counter[str] = Counter()
        self._failed: OrderedDict[str, float] = OrderedDict()  # with the ends of their pauses

    def push(
        self,
        message: StepMessage,
        extra: Sequence[runtime_pb2.Tensor],
        output: runtime_pb2.Tensor,
        client: str,
    ) -> None:
        """Push ``output`` with ``extra`` (the step's own tensors after hidden) if the step names a next server.

        ``client``: the PeerID of the session's.
        """
        if not message.next_servers or not self._has_place(peer := message.next_servers[0].peer, client):
            return
        if extra and extra[0].buffer:  # prompts are cut for our blocks, the next server needs its own
            return
        request = self._request(message, extra, output)
        if request.ByteSize() > MAX_UNARY_BYTES - UNARY_ENVELOPE_BYTES:
            return
        task = asyncio.create_task(self._send(peer, request), name="push")
        self._tasks.add(task)
        self._per_peer.setdefault(peer, {})[task] = self._clock()
        self._per_client[client] += 1
        task.add_done_callback(partial(self._end, peer, client))

    def __len__(self) -> int:
        """Pushes under way."""
        return len(self._tasks)

    async def wait(self) -> None:
        """Return when what is under way now has arrived or failed."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def stop(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()
        await self.wait()

    def _has_place(self, peer: str, client: str) -> bool:
        under_way = self._per_peer.get(peer, {})
        if len(self._tasks) >= _MAX_UNDER_WAY or len(under_way) >= _MAX_PER_PEER:
            return False
        if self._per_client[client] >= _MAX_PER_CLIENT:
            return False
        now = self._clock()
        if under_way and now - next(iter(under_way.values())) >= _STALL_S:
            return False
        return peer not in self._failed or (now >= self._failed[peer] and not under_way)

    def _end(self, peer: str, client: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        under_way = self._per_peer[peer]
        del under_way[task]
        if not under_way:
            del self._per_peer[peer]
        self._per_client[client] -= 1
        if not self._per_client[client]:
            del self._per_client[client]

    def _note(self, peer: str, *, is_reached: bool) -> None:
        self._failed.pop(peer, None)
        if is_reached:
            return
        self._failed[peer] = self._clock() + _PAUSE_S
        if len(self._failed) > _MAX_FAILED:
            self._failed.popitem(last=False)

    def _request(
        self, message: StepMessage, extra: Sequence[runtime_pb2.Tensor], output: runtime_pb2.Tensor
    ) -> runtime_pb2.ExpertRequest:
        following, *rest = message.next_servers
        metadata = {
            **message.metadata,
            "session_id": following.session_id,
            "next_servers": [(hop.peer, hop.session_id, hop.span.start, hop.span.end) for hop in rest],
            "pushed": True,
        }
        return runtime_pb2.ExpertRequest(
            uid=make_chain(self._prefix, following.span),
            tensors=[output, *extra],
            metadata=encode_metadata(metadata),
        )

    async def _send(self, peer: str, request: runtime_pb2.ExpertRequest) -> None:
        started = time.monotonic()
        try:
            await ServerStub(self._node, peer).push(request, self._timeout_s)
        except (PetalsdError, ValueError) as error:  # ValueError: not a PeerID
            log.debug("push_failed", peer=peer, error=str(error))
            self._observer.pushed(False)
            if isinstance(error, RemoteFailure):  # a refusal is an answer, which a client can provoke at will
                self._note(peer, is_reached=isinstance(error, RemoteError))
        else:
            self._note(peer, is_reached=True)
            self._observer.pushed(True)
            num_bytes = request.ByteSize()
            self._observer.sent(num_bytes)
            self._observer.acknowledged(peer, num_bytes, time.monotonic() - started)
