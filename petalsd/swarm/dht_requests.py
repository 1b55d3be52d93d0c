"""Requests of other nodes of the DHT, bounded before hivemind answers them, which it does without a pause.

For each key of a lookup it looks through the routing table and adds what is stored, however often and however
much: a message of 200 kB kept the loop busy for two seconds. An answer that is too large for p2pd it never sends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, PeerID
from hivemind.proto import dht_pb2

from petalsd.errors import BadRequest, Overloaded, PetalsdError
from petalsd.swarm.dht_storage import BoundedStorage
from petalsd.swarm.faults import CallFailed, wire_text
from petalsd.swarm.protocol import MAX_UNARY_BYTES, UNARY_ENVELOPE_BYTES
from petalsd.swarm.wire_fields import has_more_fields

_FIND, _STORE = "DHTProtocol.rpc_find", "DHTProtocol.rpc_store"
_MAX_FOUND_KEYS = 256  # hivemind's own nodes ask for 16 at once
_MAX_STORED_KEYS = 4096
_FIELDS_OF_STORED, _OTHER_FIELDS = 3, 4

Check = Callable[[bytes], None]
Handler = Callable[[bytes, PeerID], Awaitable[bytes]]


def bound_requests(node: DHTNode, p2p: P2P) -> None:
    """For a node that has just joined and keeps its storage; one in client mode answers nobody."""
    handlers: dict[str, Handler] = p2p._client.control.unary_handlers
    find = _FindCheck(node.protocol.storage, node.protocol.cache)
    for name, check in ((_FIND, find), (_STORE, _check_store)):
        if name in handlers:
            handlers[name] = _checked(name, check, handlers[name])


class _FindCheck:
    """Few keys, and values that fit into one message."""

    def __init__(self, *stores: BoundedStorage) -> None:
        self._stores = stores

    def __call__(self, payload: bytes) -> None:
        if has_more_fields(payload, _MAX_FOUND_KEYS + _OTHER_FIELDS):
            raise BadRequest("keys", f"{len(payload)} bytes", f"at most {_MAX_FOUND_KEYS} in a lookup")
        try:
            keys = [DHTID.from_bytes(key) for key in dht_pb2.FindRequest.FromString(payload).keys]
        except (DecodeError, AssertionError):
            raise BadRequest("keys", f"{len(payload)} bytes", "must be DHT ids") from None
        num_bytes = sum(max(store.num_bytes_of(key) for store in self._stores) for key in keys)
        if num_bytes > MAX_UNARY_BYTES - UNARY_ENVELOPE_BYTES:
            raise Overloaded(f"the values of {len(keys)} keys take {num_bytes} bytes", hint="ask for fewer")


def _check_store(payload: bytes) -> None:
    if has_more_fields(payload, _FIELDS_OF_STORED * _MAX_STORED_KEYS + _OTHER_FIELDS):
        raise BadRequest("keys", f"{len(payload)} bytes", f"at most {_MAX_STORED_KEYS} in a request to store")


def _checked(name: str, check: Check, handler: Handler) -> Handler:
    async def answer(payload: bytes, caller: PeerID) -> bytes:
        try:
            check(payload)
        except PetalsdError as error:
            raise CallFailed(wire_text(error, name, caller.to_base58())) from None
        return await handler(payload, caller)

    return answer
