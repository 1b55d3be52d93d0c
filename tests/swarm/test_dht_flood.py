"""One peer asks our node of the DHT for as much as it can: it gets its share, and everybody else theirs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer

from petalsd.swarm import dht_requests, peer_allowance
from petalsd.swarm.dht_storage import WriterLimits
from petalsd.swarm.faults import CallFailed
from petalsd.swarm.node import Node
from petalsd.swarm.peer_allowance import OverShare, TimeShares
from tests.swarm.servers import joining, node

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]

STORE = "DHTProtocol.rpc_store"
UIDS = [f"m.{number}" for number in range(80)]
Swarm = tuple[Node, Node, Node]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm() -> AsyncIterator[Swarm]:
    """One that is asked, a server of 80 blocks and a stranger; half of what may come at once may."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_allowance, "_TIME_BURST_S", peer_allowance._TIME_BURST_S / 2)
        async with three_nodes() as nodes:
            yield nodes


@contextlib.asynccontextmanager
async def three_nodes() -> AsyncIterator[Swarm]:
    async with (
        node() as asked,
        node(await joining(asked)) as modest,
        node(await joining(asked, client_mode=True)) as greedy,
    ):
        yield asked, modest, greedy


def find_request(count: int) -> bytes:
    keys = [DHTID.generate(f"x.{number}").to_bytes() for number in range(count)]
    return bytes(dht_pb2.FindRequest(keys=keys).SerializeToString())


def store_request(count: int, name: str = "key") -> bytes:
    keys = [DHTID.generate(f"{name}.{number}").to_bytes() for number in range(count)]
    request = dht_pb2.StoreRequest(
        keys=keys,
        subkeys=[MSGPackSerializer.dumps("name")] * count,
        values=[MSGPackSerializer.dumps(number) for number in range(count)],
        expiration_time=[time.time() + 60] * count,
        in_cache=[False] * count,
    )
    return bytes(request.SerializeToString())


async def call(asked: Node, asking: Node, method: str, request: bytes) -> bytes:
    peer = PeerID.from_base58(asked.peer_id)
    async with asyncio.timeout(20):
        answer: bytes = await asking.p2p._client.call_unary_handler(peer, f"DHTProtocol.{method}", request)
    return answer


async def use(asked: Node, modest: Node, round_: int) -> None:
    """What a server does every ten seconds or more: all its records, written and read."""
    assert await modest.store(UIDS, modest.peer_id, round_, time.time() + 60 + round_, 10) == []
    found = await modest.get(UIDS, 10)
    assert all(found[uid][modest.peer_id].value == round_ for uid in UIDS)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each peer was told that it has had its share."""
    peers: Counter[str] = Counter()
    check = TimeShares.check

    def noted(shares: TimeShares, peer: str) -> None:
        try:
            check(shares, peer)
        except OverShare:
            peers[peer] += 1
            raise

    monkeypatch.setattr(TimeShares, "check", noted)
    return peers


async def test_a_flood_is_bounded_and_others_are_answered(swarm: Swarm, refused: Counter[str]) -> None:
    """Eight lookups of 256 keys at a time without a pause: some are refused, and a server's own never."""
    asked, modest, greedy = swarm
    is_over = False

    async def flood() -> None:
        while not (is_over and refused):
            try:
                await call(asked, greedy, "rpc_find", find_request(256))
            except P2PHandlerError as error:
                assert "overloaded: your requests took" in str(error)

    flooding = [asyncio.create_task(flood()) for _ in range(8)]
    for round_ in range(3):
        await use(asked, modest, round_)
    is_over = True
    await asyncio.gather(*flooding)
    assert set(refused) == {greedy.peer_id}


async def test_the_usual_rate_of_servers_is_far_below_their_share(
    swarm: Swarm, refused: Counter[str]
) -> None:
    """Ten rounds in a row, of which a server makes one in ten seconds, fit into half of what may come at once."""
    asked, modest, _ = swarm
    for round_ in range(100, 110):
        await use(asked, modest, round_)
    assert not refused


async def test_a_flood_of_keys_does_not_fill_the_storage(swarm: Swarm) -> None:
    """A stranger adds what one may; a server's new records are kept, and those that it writes anew."""
    asked, modest, _ = swarm
    storage, store = asked.dht.protocol.storage, asked.p2p._client.control.unary_handlers[STORE]
    before = len(storage)
    for number in range(3):
        with contextlib.suppress(CallFailed):  # its time may be up before
            await store(store_request(4096, f"flood {number}"), PeerID.from_base58("Qm" + "f" * 44))
    assert 0 < len(storage) - before <= WriterLimits().num_keys
    for round_ in range(200, 202):
        await use(asked, modest, round_)
    assert all(DHTID.generate(uid) in storage for uid in UIDS)


@pytest.mark.parametrize(
    ("method", "make", "count", "num_turns"),
    [
        ("rpc_find", find_request, 256, 256 // dht_requests._FOUND_AT_ONCE),
        ("rpc_store", store_request, 4096, 4096 // dht_requests._STORED_AT_ONCE),
    ],
)
async def test_a_large_request_leaves_others_their_turn(
    swarm: Swarm, method: str, make: Callable[[int], bytes], count: int, num_turns: int
) -> None:
    """It is answered some keys at a time, and the answer is as long as that of hivemind in one."""
    asked = swarm[0]
    handler = asked.p2p._client.control.unary_handlers[f"DHTProtocol.{method}"]
    turns = 0
    answering = asyncio.create_task(handler(make(count), PeerID.from_base58("Qm" + "t" * 44)))
    while not answering.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns >= num_turns
    if method == "rpc_find":
        assert len(dht_pb2.FindResponse.FromString(answering.result()).results) == 256
    else:
        stored = dht_pb2.StoreResponse.FromString(answering.result()).store_ok
        assert sum(stored) == min(4096, WriterLimits().num_keys)
        assert len(stored) == 4096


async def test_a_request_in_pieces_stores_what_it_says(swarm: Swarm) -> None:
    """Each key gets its own value and subkey, those of dictionaries too."""
    asked, modest, _ = swarm
    count = 3 * dht_requests._STORED_AT_ONCE + 1
    await call(asked, modest, "rpc_store", store_request(count, "own"))
    storage = asked.dht.protocol.storage
    for number in range(count):
        found = storage.get(DHTID.generate(f"own.{number}"))
        assert MSGPackSerializer.loads(found.value.get("name").value) == number


async def test_a_damaged_request_in_pieces_is_refused(swarm: Swarm) -> None:
    """One key more than values, or bytes that are no message."""
    asked, modest, _ = swarm
    request = dht_pb2.StoreRequest.FromString(store_request(300, "damaged"))
    request.keys.append(request.keys[0])
    with pytest.raises(P2PHandlerError, match="bad_request: keys"):
        await call(asked, modest, "rpc_store", request.SerializeToString())
    assert DHTID.generate("damaged.0") not in asked.dht.protocol.storage
