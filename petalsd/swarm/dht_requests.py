"""Requests of other nodes of the DHT, bounded before hivemind answers them, which it does without a pause.

For each key of a lookup it looks through the routing table and adds what is stored, however often and however
much: a message of 200 kB kept the loop busy for two seconds. An answer that is too large for p2pd it never sends.
And it stores whatever a message brings: 3 MB of dictionaries of small entries took it five seconds.
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
from petalsd.swarm.protocol import MAX_UNARY_BYTES, UNARY_ENVELOPE_BYTES
from petalsd.swarm.wire_fields import has_more_fields

_FIND, _STORE = "DHTProtocol.rpc_find", "DHTProtocol.rpc_store"
_MAX_FOUND_KEYS = 256  # hivemind's own nodes ask for 16 at once
_MAX_STORED_KEYS = 4096
_FIELDS_OF_STORED, _OTHER_FIELDS = 3, 4
ASK_FOR_FEWER = "ask for fewer"
"""Ends the refusal of a lookup whose answer would not fit into one message."""

_PART_BYTES = 32 * 1024  # what a server of a hundred blocks announces
_MAX_LARGE = 8
_TIME_SHARE = 0.2  # of the loop's time, for all that is larger

Check = Callable[[bytes], None]
Handler = Callable[[bytes, PeerID], Awaitable[bytes]]


def bound_requests(node: DHTNode, p2p: P2P) -> None:
    """For a node that has just joined and keeps its storage; one in client mode answers nobody."""
    handlers: dict[str, Handler] = p2p._client.control.unary_handlers
    find = _FindCheck(node.protocol.storage, node.protocol.cache)
    if _FIND in handlers:
        handlers[_FIND] = _checked(_FIND, find, handlers[_FIND])
    if _STORE in handlers:
        handlers[_STORE] = _checked(_STORE, _check_store, LargeStores(handlers[_STORE]).store)


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
            raise Overloaded(f"the values of {len(keys)} keys take {num_bytes} bytes", hint=ASK_FOR_FEWER)


def _check_store(payload: bytes) -> None:
    if has_more_fields(payload, _FIELDS_OF_STORED * _MAX_STORED_KEYS + _OTHER_FIELDS):
        raise BadRequest("keys", f"{len(payload)} bytes", f"at most {_MAX_STORED_KEYS} in a request to store")


class LargeStores:
    """Large requests to store: one at a time, in parts, with pauses in between. Small ones as they come."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._turn = asyncio.Lock()
        self._num_large = 0
        self._resume_s = 0.0

    async def store(self, payload: bytes, caller: PeerID) -> bytes:
        """In the place of hivemind's. Overloaded while too many large ones wait."""
        if len(payload) <= _PART_BYTES:
            return await self._handler(payload, caller)
        if self._num_large >= _MAX_LARGE:
            raise Overloaded(f"{_MAX_LARGE} large requests to store are under way", hint="send less at once")
        self._num_large += 1
        try:
            async with self._turn:
                return await self._store_parts(payload, caller)
        finally:
            self._num_large -= 1

    async def _store_parts(self, payload: bytes, caller: PeerID) -> bytes:
        answer = dht_pb2.StoreResponse()
        for part in _parts(payload):
            await asyncio.sleep(self._resume_s - time.monotonic())
            began_s = time.monotonic()
            answer.MergeFrom(dht_pb2.StoreResponse.FromString(await self._handler(part, caller)))
            self._resume_s = began_s + (time.monotonic() - began_s) / _TIME_SHARE
        packed: bytes = answer.SerializeToString()
        return packed


def _parts(payload: bytes) -> Iterator[bytes]:
    """Requests of so many bytes, or of one value, that together are this one. The first introduces its sender."""
    try:
        request = dht_pb2.StoreRequest.FromString(payload)
        columns = request.keys, request.subkeys, request.values, request.expiration_time, request.in_cache
        rows = list(zip(*columns, strict=True))
    except (DecodeError, ValueError):
        raise BadRequest("keys", f"{len(payload)} bytes", "must be as many as values") from None
    part, num_bytes = dht_pb2.StoreRequest(peer=request.peer), 0
    for key, subkey, value, expiration_time, in_cache in rows:
        if num_bytes and num_bytes + len(value) > _PART_BYTES:
            yield part.SerializeToString()
            part, num_bytes = dht_pb2.StoreRequest(), 0
        part.keys.append(key)
        part.subkeys.append(subkey)
        part.values.append(value)
        part.expiration_time.append(expiration_time)
        part.in_cache.append(in_cache)
        num_bytes += len(key) + len(subkey) + len(value)
    yield part.SerializeToString()


def _checked(name: str, check: Check, handler: Handler) -> Handler:
    async def answer(payload: bytes, caller: PeerID) -> bytes:
        try:
            check(payload)
            return await handler(payload, caller)
        except PetalsdError as error:
            raise CallFailed(wire_text(error, name, caller.to_base58())) from None

    return answer
