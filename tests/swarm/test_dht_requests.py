"""What a peer may ask of our node of the DHT in one message."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer

from petalsd.errors import Overloaded
from petalsd.swarm.dht_requests import LargeStores
from petalsd.swarm.node import Node
from tests.swarm.servers import joining, node

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]

KEYS = [DHTID.generate(f"m.{number}") for number in range(3)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[tuple[Node, Node]]:
    """One that is asked and one that asks, as anybody may."""
    async with node() as asked, node(await joining(asked, client_mode=True)) as asking:
        yield asked, asking


async def call(pair: tuple[Node, Node], method: str, request: bytes) -> bytes:
    asked, asking = pair
    peer = PeerID.from_base58(asked.peer_id)
    async with asyncio.timeout(10):
        answer: bytes = await asking.p2p._client.call_unary_handler(peer, f"DHTProtocol.{method}", request)
    return answer


@pytest.mark.parametrize(
    ("method", "num_fields", "rule"),
    [
        ("rpc_find", 2000, "at most 256 in a lookup"),
        ("rpc_store", 20_000, "at most 4096 in a request to store"),
    ],
)
async def test_countless_keys_are_refused_unread(
    pair: tuple[Node, Node], method: str, num_fields: int, rule: str
) -> None:
    """Empty ones take two bytes each; looked up, they would hold up the loop for minutes."""
    with pytest.raises(P2PHandlerError, match=rf"bad_request: keys.*{rule}"):
        await call(pair, method, b"\x12\x00" * num_fields)
    assert math.isfinite(await pair[1].ping(pair[0].peer_id))


async def test_an_answer_that_does_not_fit_is_refused(pair: tuple[Node, Node]) -> None:
    """Nobody would ever get it, and each repetition of a key would take its size again."""
    storage, value = pair[0].dht.protocol.storage, bytes(60 * 1024)
    for number in range(40):
        name = f"peer {number}"
        assert storage.store_subkey(KEYS[0], name, MSGPackSerializer.dumps(value), time.time() + 60)
    one, two = (dht_pb2.FindRequest(keys=[KEYS[0].to_bytes()] * times) for times in (1, 2))
    answer = dht_pb2.FindResponse.FromString(await call(pair, "rpc_find", one.SerializeToString()))
    assert len(answer.results[0].value) > 40 * len(value)
    with pytest.raises(P2PHandlerError, match="overloaded: the values of 2 keys take"):
        await call(pair, "rpc_find", two.SerializeToString())


async def test_what_does_not_fit_is_asked_for_in_parts(pair: tuple[Node, Node]) -> None:
    """By our own nodes: the records of a thousand servers, block after block."""
    storage, peer = pair[0].dht.protocol.storage, PeerID.from_base58(pair[0].peer_id)
    keys = [DHTID.generate(f"large.{number}") for number in range(13)]
    for number, key in enumerate(keys):
        for name in range(20):
            value = MSGPackSerializer.dumps(bytes(50 * 1024) + bytes([number]))
            assert storage.store_subkey(key, f"peer {name}", value, time.time() + 60)
    found = await pair[1].dht.protocol.call_find(peer, keys)
    for number, key in enumerate(keys):
        entries = found[key][0].value.data
        assert len(entries) == 20
        assert MSGPackSerializer.loads(entries["peer 7"].value)[-1] == number


async def test_a_dictionary_of_countless_entries_is_not_unpacked(pair: tuple[Node, Node]) -> None:
    """Nor one inside another; entry by entry it would hold up the loop for seconds."""
    protocol, soon = pair[0].dht.protocol, time.time() + 60
    for count, is_kept in ((8192, True), (8193, False)):
        entries = DictionaryDHTValue(maxsize=math.inf)
        for number in range(count):
            entries.store(str(number), b"", soon)
        nested = DictionaryDHTValue()
        nested.store("x", entries, soon)
        for value, is_answered in ((entries, is_kept), (nested, False)):
            request = dht_pb2.StoreRequest(
                keys=[KEYS[1].to_bytes()], subkeys=[protocol.IS_DICTIONARY],
                values=[MSGPackSerializer.dumps(value)], expiration_time=[soon], in_cache=[False],
            )  # fmt: skip
            answer = call(pair, "rpc_store", request.SerializeToString())
            if is_answered:
                await answer
                continue
            with pytest.raises(P2PHandlerError):
                await answer
    assert KEYS[1] in protocol.storage


@pytest.mark.parametrize("where", ["the name of an entry", "a dictionary"])
async def test_tuples_within_many_tuples_are_not_unpacked(pair: tuple[Node, Node], where: str) -> None:
    """Two hundred of them end the process; this test would see no failure but its own end, so it sends few."""
    protocol, soon, value = pair[0].dht.protocol, time.time() + 60, MSGPackSerializer.dumps(1)
    nested: Any = "x"
    for _ in range(16):
        nested = (nested,)
    tag, value = {
        "the name of an entry": (MSGPackSerializer.dumps(nested), value),
        "a dictionary": (protocol.IS_DICTIONARY, MSGPackSerializer.dumps(nested)),
    }[where]
    request = dht_pb2.StoreRequest(
        keys=[KEYS[2].to_bytes()], subkeys=[tag], values=[value], expiration_time=[soon], in_cache=[False]
    )
    with pytest.raises(P2PHandlerError, match="nested too deeply"):
        await call(pair, "rpc_store", request.SerializeToString())


def large(num_values: int, num_bytes: int) -> dht_pb2.StoreRequest:
    return dht_pb2.StoreRequest(
        keys=[DHTID.generate(f"large.{number}").to_bytes() for number in range(num_values)],
        subkeys=[MSGPackSerializer.dumps("x")] * num_values,
        values=[MSGPackSerializer.dumps(bytes(num_bytes))] * num_values,
        expiration_time=[time.time() + 60] * num_values,
        in_cache=[number % 10 == 0 for number in range(num_values)],
    )


async def test_a_large_request_is_stored_whole_and_answered_once(pair: tuple[Node, Node]) -> None:
    request = large(100, 3000)
    answer = await call(pair, "rpc_store", request.SerializeToString())
    stored = dht_pb2.StoreResponse.FromString(answer)
    assert list(stored.store_ok) == [not is_cached for is_cached in request.in_cache]
    assert stored.peer.node_id == pair[0].dht.node_id.to_bytes()
    del request.values[50:]
    with pytest.raises(P2PHandlerError, match=r"bad_request: keys.*must be as many as values"):
        await call(pair, "rpc_store", request.SerializeToString())


async def test_large_requests_are_stored_in_turn_and_in_parts_with_pauses() -> None:
    """3 MB of dictionaries of small entries took five seconds, in which nobody else was served."""
    spans: list[tuple[float, float]] = []

    async def handler(payload: bytes, caller: PeerID) -> bytes:
        began_s = time.monotonic()
        time.sleep(0.01)  # noqa: ASYNC251  # as hivemind
        spans.append((began_s, time.monotonic()))
        keys = dht_pb2.StoreRequest.FromString(payload).keys
        assert len(keys) <= 10
        return bytes(dht_pb2.StoreResponse(store_ok=[True] * len(keys)).SerializeToString())

    stores, caller = LargeStores(handler), PeerID(b"peer")
    payload = large(25, 3000).SerializeToString()
    answers = await asyncio.gather(*(stores.store(payload, caller) for _ in range(9)), return_exceptions=True)
    *stored, refused = answers
    assert isinstance(refused, Overloaded)
    assert all(len(dht_pb2.StoreResponse.FromString(one).store_ok) == 25 for one in stored)
    assert len(spans) == 8 * 3
    pauses = [later - end for (_, end), (later, _) in itertools.pairwise(spans)]
    assert min(pauses) > 0.03


async def test_what_is_no_lookup_is_refused(pair: tuple[Node, Node]) -> None:
    """Bytes that are no message, or a key that is no id."""
    for request in (b"\xff\xff", dht_pb2.FindRequest(keys=[b"\1" * 40]).SerializeToString()):
        with pytest.raises(P2PHandlerError):
            await call(pair, "rpc_find", request)


async def test_lookups_and_entries_of_others_are_answered(pair: tuple[Node, Node]) -> None:
    """As many as nodes of hivemind send."""
    asked, asking = pair
    uids = [f"n.{number}" for number in range(200)]
    assert await asking.store(uids, asking.peer_id, 1, time.time() + 60, 10) == []
    found = await asking.get(uids, 10)
    assert all(asking.peer_id in found[uid] for uid in uids)
    assert DHTID.generate("n.0") in asked.dht.protocol.storage
