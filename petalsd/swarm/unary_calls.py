"""Unary calls of other peers, counted and bounded as what comes through streams.

p2pd hands each one over as one message of up to 4 MiB. hivemind would parse it before anybody could look at it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from google.protobuf.message import Message
from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2

from petalsd.swarm.codec import unpacked_bytes
from petalsd.swarm.inbound_budget import Budget
from petalsd.swarm.stream import parse_message

M = TypeVar("M", bound=Message)


async def add_unary_handler(p2p: P2P, name: str, answer: Callable[[bytes, str], Awaitable[bytes]]) -> None:
    """Have ``answer`` called with the message and the caller's PeerID (base58); what it raises is sent as text."""

    async def handle(payload: bytes, caller: PeerID) -> bytes:
        return await answer(payload, caller.to_base58())

    await p2p._client.add_unary_handler(name, handle)


@contextlib.contextmanager
def counted_request(payload: bytes, request_type: type[M], budget: Budget) -> Iterator[M]:
    """The request, which counts against the budget meanwhile, compressed tensors as what they become.

    Overloaded when that is too much; BadRequest as ``stream.parse_message``.
    """
    num_bytes = len(payload)
    budget.take(num_bytes)
    try:
        request = parse_message(request_type, payload)
        more = max(0, _unpacked_bytes(request) - num_bytes)
        budget.take(more)
        num_bytes += more
        yield request
    finally:
        budget.give_back(num_bytes)


def _unpacked_bytes(request: Message) -> int:
    return unpacked_bytes(request.tensors) if isinstance(request, runtime_pb2.ExpertRequest) else 0
