"""Lookups in the DHT among nodes that answer anything: the records of the others are read."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hivemind.dht.crypto import DHTRecord
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration

from petalsd.swarm import dht_guard
from petalsd.swarm.dht_guard import BoundedSerializer, DHTGuard
from petalsd.swarm.dht_requests import ASK_FOR_FEWER
from petalsd.swarm.directory import read_view
from petalsd.swarm.protocol import ServerState, make_uid
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan
from tests.swarm.servers import joining, node
from tests.tiers import nightly_except

KEY = DHTID.generate("m.0")
RECORD = ServerRecord(ServerState.ONLINE, 10.0, BlockSpan(0, 2))
ONE = MSGPackSerializer.dumps(1)
Storage = DHTLocalStorage


def entry(storage: Storage, subkey: object, expiration: float, value: Any = ONE, maxsize: Any = None) -> None:
    """In a dictionary as no node of hivemind makes it."""
    dictionary = DictionaryDHTValue()
    dictionary.data[subkey] = ValueWithExpiration(value, expiration)
    dictionary.maxsize = maxsize or dictionary.maxsize
    dictionary.latest_expiration_time = expiration
    storage.data[KEY] = ValueWithExpiration(dictionary, expiration)


# What a hostile node has under the key of a record that expires at ``soon``.
STRANGE: dict[str, Callable[[Storage, float], None]] = {
    "a subkey that cannot be compared": lambda storage, soon: entry(storage, 5, soon),
    "a plain value that lives longer": lambda storage, soon: storage.data.update(
        {KEY: ValueWithExpiration(ONE, soon + 1)}
    ),
    "an entry that lives for ever": lambda storage, _: entry(storage, "x", math.inf),
    "an entry that lives no time": lambda storage, _: entry(storage, "x", math.nan),
    "a value that is no bytes": lambda storage, soon: entry(storage, "x", soon, 7),
    "a bound that is no number": lambda storage, soon: entry(storage, "x", soon + 1, maxsize="x"),
    "a bound of nothing": lambda storage, soon: entry(storage, "x", soon + 1, maxsize=-1),
}


@pytest.mark.swarm
@pytest.mark.parametrize("what", nightly_except(STRANGE, *list(STRANGE)[:3]))
async def test_a_strange_answer_hides_no_record(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Whoever reads, a client or the node that has the record itself."""
    soon, uids = time.time() + 60, [make_uid("m", 0)]
    async with (
        node() as first,
        node(await joining(first)) as hostile,
        node(await joining(first, client_mode=True)) as client,
    ):
        assert await client.store(uids, first.peer_id, RECORD.to_wire(), soon, 10) == []
        strange = DHTLocalStorage()
        STRANGE[what](strange, soon)
        monkeypatch.setattr(hostile.dht.protocol, "storage", strange)
        for reader in (client, first):
            view = await read_view(reader, "m", 1, timeout_s=5)
            assert list(view.blocks[0]) == [first.peer_id]


@pytest.mark.parametrize("depth", [9, 5000])
def test_a_value_of_many_nested_tuples_reads_as_none(depth: int) -> None:
    """5000 would end the process: each level takes some 40 kB of the stack."""
    value = MSGPackSerializer.dumps("x")
    for _ in range(depth):
        value = msgpack.packb(msgpack.ExtType(0x40, b"\x91" + value))
    stripped = DHTGuard().strip_value(DHTRecord(b"key", b"subkey", value, 0.0))
    assert MSGPackSerializer.loads(stripped) is None


def test_values_of_servers_are_unpacked_as_they_are() -> None:
    value = MSGPackSerializer.dumps(RECORD.to_wire())
    assert DHTGuard().strip_value(DHTRecord(b"key", b"subkey", value, 0.0)) == value
    assert BoundedSerializer.loads(value) == RECORD.to_wire()


@pytest.mark.swarm
async def test_a_node_that_joins_is_guarded_from_the_first_moment_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers others, and reads what they answer, before it has joined."""
    monkeypatch.setattr(DHTProtocol, "serializer", MSGPackSerializer)
    seen: list[type] = []
    create = DHTNode.create

    async def look(*args: Any, **kwargs: Any) -> DHTNode:
        seen.append(DHTProtocol.serializer)
        return await create(*args, **kwargs)

    monkeypatch.setattr(DHTNode, "create", look)
    async with node():
        assert seen == [BoundedSerializer]


async def test_a_node_that_refuses_for_ever_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of a lookup has a deadline, and so has the whole: others wait for its place."""

    class Refusing:
        async def rpc_find(self, request: dht_pb2.FindRequest, timeout: float | None) -> dht_pb2.FindResponse:
            if len(request.keys) == 1:
                await asyncio.Event().wait()
            raise P2PHandlerError(f"overloaded: too much ({ASK_FOR_FEWER})")

    monkeypatch.setattr(dht_guard, "_LOOKUP_S", 0.05)
    stub = dht_guard._LookupStub(Refusing(), 20)
    async with asyncio.timeout(30):
        with pytest.raises(TimeoutError):
            await stub.rpc_find(dht_pb2.FindRequest(keys=[b"a", b"b"]), 3.0)


@pytest.mark.swarm
async def test_an_answer_names_as_many_nodes_as_a_bucket_holds() -> None:
    """Else a lookup would go on to thousands that are not there, each nearer than all that are."""
    response = dht_pb2.FindResponse(results=[dht_pb2.FindResult(type=dht_pb2.NOT_FOUND)])
    for number in range(1, 1001):
        response.results[0].nearest_node_ids.append(DHTID(KEY ^ number).to_bytes())
        response.results[0].nearest_peer_ids.append(b"\x12\x20" + number.to_bytes(32))

    async def answer(payload: bytes, caller: PeerID) -> bytes:
        return bytes(response.SerializeToString())

    async with node() as hostile, node(await joining(hostile, client_mode=True)) as client:
        hostile.p2p._client.control.unary_handlers["DHTProtocol.rpc_find"] = answer
        found = await client.dht.protocol.call_find(hostile.p2p.peer_id, [KEY])
        (_, nearest), size = found[KEY], client.dht.protocol.bucket_size
        assert list(nearest) == [DHTID(KEY ^ number) for number in range(1, size + 1)]
