"""Nodes of the DHT that we have not met before, and such as say so."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.dht.routing import DHTID, RoutingTable
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from petalsd.swarm.dht_newcomers import bound_newcomers
from petalsd.swarm.dht_storage import BoundedStorage
from petalsd.swarm.protocol import MAX_UNARY_BYTES
from tests.swarm.servers import joining, node

IDS = [DHTID.generate(f"node {number}") for number in range(8)]
PEERS = [PeerID(b"peer %d" % number) for number in range(8)]


class Protocol:
    """hivemind's, as far as it is bounded. A new id takes ``busy_s`` of a clock that stands still else."""

    def __init__(self, busy_s: float = 0.0) -> None:
        self.routing_table = RoutingTable(DHTID.generate("own"), bucket_size=20, depth_modulo=5)
        self.now = 0.0
        self.sent: list[dict[str, Any]] = []
        self._busy_s = busy_s
        bound_newcomers(SimpleNamespace(protocol=self), lambda: self.now)

    async def update_routing_table(self, node_id: DHTID, peer_id: PeerID, responded: bool = True) -> None:
        if node_id not in self.routing_table:
            self.now += self._busy_s
        if responded:
            self.routing_table.add_or_update_node(node_id, peer_id)
        elif node_id in self.routing_table:
            del self.routing_table[node_id]

    async def call_store(
        self, peer: PeerID, keys: Sequence[DHTID], values: Sequence[Any], **rest: Any
    ) -> list[bool]:
        self.sent.append({"keys": keys, "values": values, **rest})
        return [True] * len(keys)


async def test_a_peer_has_one_id() -> None:
    """The latest: a server that starts anew has another one."""
    protocol = Protocol()
    for node_id in IDS:
        await protocol.update_routing_table(node_id, PEERS[0])
    table = protocol.routing_table
    assert table.uid_to_peer_id == {IDS[-1]: PEERS[0]} and table.peer_id_to_uid == {PEERS[0]: IDS[-1]}
    await protocol.update_routing_table(IDS[-1], PEERS[0], responded=False)
    assert not table.uid_to_peer_id


async def test_nobody_takes_the_id_of_another() -> None:
    """Until that one answers no more; else one peer would stand for all that we know."""
    protocol = Protocol()
    await protocol.update_routing_table(IDS[0], PEERS[0])
    await protocol.update_routing_table(IDS[0], PEERS[1])
    assert protocol.routing_table.get(node_id=IDS[0]) == PEERS[0]
    await protocol.update_routing_table(IDS[0], PEERS[0], responded=False)
    await protocol.update_routing_table(IDS[0], PEERS[1])
    assert protocol.routing_table.get(node_id=IDS[0]) == PEERS[1]


async def test_newcomers_take_a_tenth_of_the_time() -> None:
    """Who comes while others had their share comes again; who is known is not kept out."""
    protocol = Protocol(busy_s=0.5)
    table = protocol.routing_table
    await protocol.update_routing_table(IDS[0], PEERS[0])
    protocol.now += 4.9
    await protocol.update_routing_table(IDS[1], PEERS[1])
    await protocol.update_routing_table(IDS[0], PEERS[0])
    assert list(table.uid_to_peer_id) == [IDS[0]]
    protocol.now += 0.1
    await protocol.update_routing_table(IDS[1], PEERS[1])
    assert list(table.uid_to_peer_id) == [IDS[0], IDS[1]]


@pytest.mark.parametrize("in_cache", [False, [False, True, False]])
async def test_what_does_not_fit_into_one_message_is_not_sent(in_cache: bool | list[bool]) -> None:
    """What comes before it is; hivemind would pack all of it, and send nothing."""
    protocol = Protocol()
    entries = DictionaryDHTValue()
    entries.store("x", bytes(MAX_UNARY_BYTES // 4), 1e12)
    values = [entries, b"small", entries]
    ends = [1.0, 2.0, 3.0]
    stored = await protocol.call_store(PEERS[0], IDS[:3], values, expiration_time=ends, in_cache=in_cache)
    assert stored == [True, True, False]
    (sent,) = protocol.sent
    assert (sent["keys"], sent["expiration_time"]) == (IDS[:2], [1.0, 2.0])
    assert sent["in_cache"] == (in_cache if in_cache is False else [False, True])
    assert await protocol.call_store(PEERS[0], IDS[:1], [b"small"], expiration_time=1.0) == [True]


@pytest.mark.swarm
async def test_pings_with_countless_ids_do_not_hold_up_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one peer; much is stored here, and each id would have us look through all of it."""
    searches = 0

    class Storage(BoundedStorage):
        def items(self) -> Iterator[Any]:
            nonlocal searches
            searches += 1
            return super().items()

    async with node() as asked, node(await joining(asked, client_mode=True)) as asking:
        protocol, storage = asked.dht.protocol, Storage()
        for number in range(2000):
            assert storage.store_subkey(DHTID.generate(f"m.{number}"), "x", b"\1", time.time() + 600)
        monkeypatch.setattr(protocol, "storage", storage)
        for number in range(100):
            info = dht_pb2.NodeInfo(node_id=DHTID.generate(f"id {number}").to_bytes())
            request = dht_pb2.PingRequest(peer=info).SerializeToString()
            peer = PeerID.from_base58(asked.peer_id)
            await asking.p2p._client.call_unary_handler(peer, "DHTProtocol.rpc_ping", request)
        assert 1 <= searches < 50 and len(protocol.routing_table.uid_to_peer_id) <= 1
