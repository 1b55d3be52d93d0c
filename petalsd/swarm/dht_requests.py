"""Requests of other nodes of the DHT, bounded before hivemind answers them, which it does without a pause.

For each key of a lookup it looks through the routing table and adds what is stored, however often and however
much: a message of 200 kB kept the loop busy for two seconds. An answer that is too large for p2pd it never sends.
So a request has few keys, is answered some keys at a time, and no peer's take more than its share of the time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator

from google.protobuf.message import DecodeError
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, PeerID
from hivemind.proto import dht_pb2

from petalsd.errors import BadRequest, Overloaded, PetalsdError
from petalsd.swarm.dht_storage import BoundedStorage
from petalsd.swarm.faults import CallFailed, wire_text
from petalsd.swarm.peer_allowance import OverShare, TimeShares
from petalsd.swarm.protocol import MAX_UNARY_BYTES, UNARY_ENVELOPE_BYTES
from petalsd.swarm.wire_fields import has_more_fields

_PING, _FIND, _STORE = (f"DHTProtocol.rpc_{method}" for method in ("ping", "find", "store"))
_MAX_FOUND_KEYS = 256  # hivemind's own nodes ask for 16 at once
_MAX_STORED_KEYS = 4096
_FIELDS_OF_STORED, _OTHER_FIELDS = 3, 4
_FOUND_AT_ONCE, _STORED_AT_ONCE = 16, 64  # keys, in some milliseconds
_CALL_S = 0.0005  # what any takes beside, with p2pd's messages and tasks

Handler = Callable[[bytes, PeerID], Awaitable[bytes]]
Pieces = Callable[[bytes], Iterator[bytes]]
"""Requests that come to the same, one after the other. Raises for one that is refused."""


def bound_requests(node: DHTNode, p2p: P2P) -> None:
    """For a node that has just joined and keeps its storage; one in client mode answers nobody."""
    handlers: dict[str, Handler] = p2p._client.control.unary_handlers
    shares = TimeShares()
    storage: BoundedStorage = node.protocol.storage
    find = _FindPieces(storage, node.protocol.cache)
    if _STORE in handlers:
        handlers[_STORE] = _by_writer(storage, handlers[_STORE])
    for name, pieces in ((_PING, None), (_FIND, find), (_STORE, _store_pieces)):
        if name in handlers:
            handlers[name] = _bounded(name, pieces, shares, handlers[name])


class _FindPieces:
    """Of lookups of few keys, and values that fit into one message."""

    def __init__(self, *stores: BoundedStorage) -> None:
        self._stores = stores

    def __call__(self, payload: bytes) -> Iterator[bytes]:
        if has_more_fields(payload, _MAX_FOUND_KEYS + _OTHER_FIELDS):
            raise BadRequest("keys", f"{len(payload)} bytes", f"at most {_MAX_FOUND_KEYS} in a lookup")
        try:
            request = dht_pb2.FindRequest.FromString(payload)
            keys = [DHTID.from_bytes(key) for key in request.keys]
        except (DecodeError, AssertionError):
            raise BadRequest("keys", f"{len(payload)} bytes", "must be DHT ids") from None
        num_bytes = sum(max(store.num_bytes_of(key) for store in self._stores) for key in keys)
        if num_bytes > MAX_UNARY_BYTES - UNARY_ENVELOPE_BYTES:
            raise Overloaded(f"the values of {len(keys)} keys take {num_bytes} bytes", hint="ask for fewer")
        if len(keys) <= _FOUND_AT_ONCE:
            yield payload
            return
        for first in range(0, len(keys), _FOUND_AT_ONCE):
            some = request.keys[first : first + _FOUND_AT_ONCE]
            yield dht_pb2.FindRequest(keys=some, peer=request.peer).SerializeToString()


def _store_pieces(payload: bytes) -> Iterator[bytes]:
    if has_more_fields(payload, _FIELDS_OF_STORED * _MAX_STORED_KEYS + _OTHER_FIELDS):
        raise BadRequest("keys", f"{len(payload)} bytes", f"at most {_MAX_STORED_KEYS} in a request to store")
    if not has_more_fields(payload, _FIELDS_OF_STORED * _STORED_AT_ONCE + _OTHER_FIELDS):
        yield payload
        return
    try:
        request = dht_pb2.StoreRequest.FromString(payload)
    except DecodeError:
        raise BadRequest("message", f"{len(payload)} bytes", "not a StoreRequest") from None
    fields = ("keys", "subkeys", "values", "expiration_time", "in_cache")
    if len({len(getattr(request, field)) for field in fields}) > 1:
        raise BadRequest("keys", len(request.keys), "each has a subkey, a value and a time")
    for first in range(0, len(request.keys), _STORED_AT_ONCE):
        some = slice(first, first + _STORED_AT_ONCE)
        piece = dht_pb2.StoreRequest(**{field: getattr(request, field)[some] for field in fields})
        piece.peer.CopyFrom(request.peer)
        yield piece.SerializeToString()


def _by_writer(storage: BoundedStorage, handler: Handler) -> Handler:
    async def store(payload: bytes, caller: PeerID) -> bytes:
        storage.writer = caller.to_base58()
        try:
            return await handler(payload, caller)  # which never waits
        finally:
            storage.writer = None

    return store


def _bounded(name: str, pieces: Pieces | None, shares: TimeShares, handler: Handler) -> Handler:
    """Without ``pieces`` nothing but the number of requests is bounded."""

    async def answer(payload: bytes, caller: PeerID) -> bytes:
        peer = caller.to_base58()
        try:
            shares.check(peer)
            shares.charge(peer, _CALL_S)
            if pieces is not None:
                return await in_pieces(pieces(payload), caller, peer)
        except OverShare as error:
            raise CallFailed(str(error)) from None  # whoever asks so often is not worth a line each time
        except PetalsdError as error:
            raise CallFailed(wire_text(error, name, peer)) from None
        return await handler(payload, caller)

    async def in_pieces(requests: Iterator[bytes], caller: PeerID, peer: str) -> bytes:
        answers: list[bytes] = []
        began_s = time.thread_time()
        for request in requests:
            if answers:
                shares.check(peer)
            answers.append(await handler(request, caller))
            shares.charge(peer, time.thread_time() - began_s)
            await asyncio.sleep(0)
            began_s = time.thread_time()
        return b"".join(answers)  # protobuf's way to make one message of several

    return answer
