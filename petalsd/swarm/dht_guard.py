"""Keeps one bad DHT value, or one bad answer, from breaking a whole lookup.

hivemind unpacks values in the middle of its search; bytes that are not msgpack would end the search without
an answer for anybody. As a record validator this guard sees each value just before, and puts ``None`` in the
place of what cannot be unpacked.

It also merges the dictionaries that nodes answer as they come: an entry of another type than the rest can end that
without an answer, and what lives longer takes the place of all the rest. So answers are looked through before.

It goes on to all nodes that an answer names as nearer, however many. Sound ones name as many as a bucket holds.

And it unpacks dictionaries of any length, entry by entry and without a pause: 4 MiB of small ones take three
seconds. Tuples in tuples take another 40 kB of the stack each, and two hundred end the process: a value, or the
name of an entry, of 1 kB.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from functools import partial
from typing import Any

import msgpack
from hivemind.dht.crypto import DHTRecord
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import RecordValidatorBase
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration

from petalsd.swarm.dht_requests import ASK_FOR_FEWER
from petalsd.swarm.dht_storage import LIMITS

_NONE = MSGPackSerializer.dumps(None)
_TUPLE, _DICTIONARY = 0x40, 0x50  # hivemind's msgpack extensions
_LOOKUP_S = 15.0  # all parts of an answer of 16 messages; each has hivemind's own deadline
_MAX_DEPTH = 8  # of tuples in tuples; a server's record has two


class DHTGuard(RecordValidatorBase):  # type: ignore[misc]  # hivemind ships no types
    """Accepts everything, as our storage has its own bounds; hands out only what can be unpacked."""

    def validate(self, record: DHTRecord) -> bool:
        """Refuse none: of a dictionary that another node answers, hivemind would drop all other values with it."""
        return True

    def strip_value(self, record: DHTRecord) -> bytes:
        """The value as the search will unpack it."""
        try:
            if len(record.value) > LIMITS.max_value_bytes:
                return bytes(_NONE)
            BoundedSerializer.loads(record.value)
        except Exception:  # whatever an unpacker may raise about foreign bytes, or what is none
            return bytes(_NONE)
        return bytes(record.value)

    def merge_with(self, other: RecordValidatorBase) -> bool:
        return isinstance(other, DHTGuard)


class BoundedSerializer(MSGPackSerializer):  # type: ignore[misc]
    """Unpacks what peers send us: dictionaries of as many entries as are kept, and other values."""

    @classmethod
    def loads(cls, buf: bytes) -> object:
        """ValueError for more, for dictionaries within others, and for tuples within many others."""
        return _unpack(buf, 0)


def _unpack(data: bytes, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError("tuples nested too deeply")
    unpack_extension = partial(_unpack_extension, depth)
    return msgpack.unpackb(data, ext_hook=unpack_extension, raw=False, max_array_len=LIMITS.max_entries)


def _unpack_extension(depth: int, code: int, data: bytes) -> object:
    if code == _TUPLE:
        return tuple(_unpack(data, depth + 1))
    if code != _DICTIONARY:
        raise ValueError(f"extension {code} has no place in the directory")
    msgpack.unpackb(data, raw=False, max_array_len=LIMITS.max_entries, max_ext_len=0)
    return DictionaryDHTValue.unpackb(data)


def guard_unpacking() -> None:
    """For all nodes of this process, before they begin: they answer and ask from the first moment on."""
    DHTProtocol.serializer = BoundedSerializer


def guard_answers(node: DHTNode) -> None:
    """Have lookups of ``node`` see nothing but sound dictionaries, and those whose answer is too large for one
    message all the same.
    """
    ask = node.protocol.call_find

    async def call_find(peer: PeerID, keys: Collection[DHTID]) -> dict[DHTID, Any] | None:
        answers = await ask(peer, keys)
        if answers is None:
            return None
        return {key: (_sound(found), nearest) for key, (found, nearest) in answers.items()}

    node.protocol.call_find = call_find
    get_stub, most = node.protocol.get_stub, node.protocol.bucket_size
    node.protocol.get_stub = lambda peer: _LookupStub(get_stub(peer), most)


class _LookupStub:
    """Of the nodes that an answer names as nearer than itself, the first ``most``.

    What a node refuses for the size of the answer is asked again in halves. hivemind would drop the node, and a
    model with hundreds of servers of each block would be nowhere. It asks for 16 keys at most, a message each.
    """

    def __init__(self, stub: Any, most: int) -> None:
        self._stub = stub
        self._most = most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stub, name)

    async def rpc_find(self, request: dht_pb2.FindRequest, timeout: float | None = None) -> Any:
        """TimeoutError for a node that has parts asked for longer than they can take."""
        async with asyncio.timeout(_LOOKUP_S):
            return await self._find(request, timeout)

    async def _find(self, request: dht_pb2.FindRequest, timeout: float | None) -> Any:
        try:
            response = await self._stub.rpc_find(request, timeout=timeout)
        except P2PHandlerError as error:
            if len(request.keys) < 2 or ASK_FOR_FEWER not in str(error):
                raise
            return await self._find_halves(request, timeout)
        for result in response.results:
            del result.nearest_node_ids[self._most :]
            del result.nearest_peer_ids[self._most :]
        return response

    async def _find_halves(self, request: dht_pb2.FindRequest, timeout: float | None) -> Any:
        response, half = dht_pb2.FindResponse(), len(request.keys) // 2
        for keys in (request.keys[:half], request.keys[half:]):
            part = dht_pb2.FindRequest(keys=keys, peer=request.peer)
            response.MergeFrom(await self._find(part, timeout))
        return response


def _sound(found: ValueWithExpiration[Any] | None) -> ValueWithExpiration[Any] | None:
    """The entries that have text subkeys and end some day; nothing that the node said of them together."""
    if found is None or not isinstance(found.value, DictionaryDHTValue):
        return None
    dictionary = found.value
    entries = {subkey: item for subkey, item in dictionary.data.items() if _is_sound(subkey, item)}
    if len(entries) < len(dictionary.data):
        dictionary = DictionaryDHTValue()
        for subkey, (value, expiration_time) in entries.items():
            dictionary.store(subkey, value, expiration_time)
    if not entries:
        return None
    dictionary.maxsize = math.inf
    dictionary.latest_expiration_time = max(item.expiration_time for item in entries.values())
    return ValueWithExpiration(dictionary, dictionary.latest_expiration_time)


def _is_sound(subkey: object, item: ValueWithExpiration[Any]) -> bool:
    if not isinstance(subkey, str) or not isinstance(item.value, bytes):
        return False
    return isinstance(item.expiration_time, int | float) and math.isfinite(item.expiration_time)
