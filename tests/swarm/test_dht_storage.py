"""What a node of the DHT keeps for others: enough for large swarms, and no more than that, whoever writes."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator

import pytest
import structlog
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import timed_storage
from hivemind.utils.serializer import MSGPackSerializer

from petalsd.config_loading import load_config
from petalsd.swarm import dht_storage
from petalsd.swarm.announcer import AnnouncerOptions
from petalsd.swarm.dht_storage import LIMITS, BoundedStorage, LookupCache, StorageLimits
from petalsd.swarm.directory import read_view
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import ServerState, make_uid
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan
from tests.swarm.servers import joining, node

KEY = DHTID.generate("m.0")
PLAIN = MSGPackSerializer.dumps(None)  # the subkey of a value without subkeys
RECORD = ServerRecord(ServerState.ONLINE, 10.0, BlockSpan(0, 2))
SMALL = StorageLimits(
    max_keys=2,
    max_entries=3,
    max_key_bytes=600,
    max_subkey_chars=20,
    max_value_bytes=400,
    max_total_bytes=3500,
    max_lifetime_s=100.0,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """The time that entries expire by."""
    ours = Clock()
    monkeypatch.setattr(timed_storage, "get_dht_time", ours)
    monkeypatch.setattr(dht_storage, "get_dht_time", ours)
    yield ours


def small(clock: Clock) -> BoundedStorage:
    return BoundedStorage(SMALL, clock)


def entries(storage: BoundedStorage, key: DHTID = KEY) -> dict[str, bytes]:
    found = storage.get(key)
    return {subkey: item.value for subkey, item in found.value.items()} if found else {}


def test_a_large_swarm_fits() -> None:
    """4000 servers of one block, with long records; and 2000 servers of 200 blocks, by what 20 of those take."""
    storage, soon, value = BoundedStorage(), time.time() + 240, b"x" * 600
    for server in range(4000):
        assert storage.store_subkey(KEY, f"12D3KooW{server:044}", value, soon)
    assert len(MSGPackSerializer.dumps(next(iter(storage.items()))[1].value)) < LIMITS.max_key_bytes
    storage = BoundedStorage()
    for block in range(20):
        for server in range(2000):
            assert storage.store_subkey(DHTID(block), f"12D3KooW{server:044}", value[:500], soon)
    assert storage._num_bytes * 10 < LIMITS.max_total_bytes


@pytest.mark.parametrize(
    ("limit", "key", "subkey", "value", "lifetime_s"),
    [
        ("keys", DHTID(2), "a", b"x", 10.0),
        ("entries", KEY, "d", b"x", 10.0),
        ("value_bytes", KEY, "a", b"x" * 401, 20.0),
        ("key_bytes", KEY, "a", b"x" * 390, 20.0),
        ("subkey", KEY, "a" * 21, b"x", 10.0),
        ("subkey", KEY, 5, b"x", 10.0),
        ("lifetime", KEY, "a", b"x", 101.0),
        ("lifetime", KEY, "a", b"x", math.inf),
        ("lifetime", KEY, "a", b"x", math.nan),
    ],
)
def test_what_is_over_a_limit_is_refused(
    clock: Clock, limit: str, key: DHTID, subkey: object, value: bytes, lifetime_s: float
) -> None:
    """With a word in the log, and what was there stays as it was."""
    storage = small(clock)
    for name in "abc":
        assert storage.store(KEY, b"x" * 80, clock.now + 10, subkey=name)
    assert storage.store(DHTID(1), b"plain", clock.now + 10)
    before = entries(storage)
    with structlog.testing.capture_logs() as events:
        assert not storage.store(key, value, clock.now + lifetime_s, subkey=subkey)  # type: ignore[arg-type]
    (event,) = events
    assert (event["event"], event["refused_by"]) == ("dht_entries_refused", {limit: 1})
    assert entries(storage) == before and len(storage) == 2


def test_the_whole_is_bounded_and_what_expired_makes_room(clock: Clock) -> None:
    """New entries are refused while the old ones live; the log hears of it once in a while."""
    storage = BoundedStorage(StorageLimits(max_total_bytes=10_000), clock)
    with structlog.testing.capture_logs() as events:
        stored = [storage.store(DHTID(key), b"x" * 500, clock.now + 50, subkey="a") for key in range(30)]
    assert stored == [True] * 8 + [False] * 22 and len(events) == 1
    clock.now += 51
    assert storage.store(DHTID(50), b"x" * 500, clock.now + 50, subkey="a")
    assert len(storage) == 1 and storage._num_bytes < 2000


def test_what_is_there_is_written_anew_while_all_is_full(clock: Clock) -> None:
    """Else one peer that fills the storage would end the records of all servers within minutes."""
    storage = BoundedStorage(StorageLimits(max_total_bytes=10_000, max_entries=4, max_key_bytes=2048), clock)
    for server in "abcd":
        assert storage.store(KEY, b"x" * 400, clock.now + 50, subkey=server)
    while storage.store(DHTID(len(storage)), b"y" * 500, clock.now + 500):
        pass
    assert not storage.store(KEY, b"x", clock.now + 60, subkey="e")
    for server in "abcd":
        assert storage.store(KEY, b"z" * 410, clock.now + 60, subkey=server)
    assert entries(storage) == dict.fromkeys("abcd", b"z" * 410)


def test_nothing_goes_before_its_time(clock: Clock) -> None:
    """In hivemind's storage a shorter life or a plain value in the same place ends an entry."""
    storage = small(clock)
    assert storage.store(KEY, b"one", clock.now + 50, subkey="a")
    assert not storage.store(KEY, b"two", clock.now + 1, subkey="a")
    assert not storage.store(KEY, b"plain", clock.now + 90)
    clock.now += 40
    assert entries(storage) == {"a": b"one"}
    assert storage.store(KEY, b"two", clock.now + 50, subkey="a")
    assert entries(storage) == {"a": b"two"}
    clock.now += 51
    assert storage.get(KEY) is None and KEY not in storage


def test_a_plain_value_keeps_no_server_out(clock: Clock) -> None:
    """However long it lives: entries take its place."""
    storage = small(clock)
    assert storage.store(KEY, b"plain", clock.now + 100)
    assert storage.get(KEY).value == b"plain"  # type: ignore[union-attr]
    assert storage.store(KEY, b"one", clock.now + 10, subkey="a")
    assert entries(storage) == {"a": b"one"}


def test_writing_again_and_again_takes_no_memory(clock: Clock) -> None:
    """Each time a little longer, or in vain."""
    storage = small(clock)
    for times in range(1000):
        assert storage.store(KEY, b"x" * 80, clock.now + 10 + times / 100, subkey="a")
        assert not storage.store(KEY, b"x" * 80, clock.now + 5, subkey="a")
    held = storage._value(KEY)
    assert isinstance(held, dht_storage._Entries)
    assert max(len(held.expiration_heap), len(storage._keys.expiration_heap)) < 100
    assert storage._num_bytes == held.memory_bytes < 1000


def test_the_count_is_that_of_what_is_there(clock: Clock) -> None:
    """Through writing, replacing and expiring in any order."""
    storage, chance = BoundedStorage(StorageLimits(), clock), random.Random(0)
    for _ in range(3000):
        key, subkey = DHTID(chance.randrange(5)), chance.choice(["a", "b", "c", None])
        storage.store(key, b"x" * chance.randrange(100), clock.now + chance.uniform(0, 20), subkey=subkey)
        clock.now += chance.uniform(0, 1)
        for value, _ in storage._keys.data.values():
            if isinstance(value, dht_storage._Entries):
                assert value.num_bytes == sum(
                    dht_storage._size(name, item.value) for name, item in value.data.items()
                )
    at_most = storage._num_bytes
    storage._purged_s = -math.inf
    storage._purge()
    assert storage._num_bytes <= at_most


def test_lookups_may_add_to_what_they_get(clock: Clock) -> None:
    """hivemind merges other nodes' answers into it; what we keep stays as it is."""
    storage = small(clock)
    storage.store(KEY, b"one", clock.now + 50, subkey="a")
    found = storage.get(KEY)
    assert found is not None and type(found.value) is DictionaryDHTValue
    found.value.store("b", b"x" * 10_000, clock.now + 50)
    assert entries(storage) == {"a": b"one"}


def test_the_cache_takes_what_lookups_found(clock: Clock) -> None:
    """Whole dictionaries, without what is over the limits; what peers write is no part of it."""
    cache = LookupCache(SMALL, clock)
    found = DictionaryDHTValue()
    peers_wrote = {"a": b"one", 5: b"two", "b": b"x" * 500, "c": 7, "d": b"three"}
    for more_s, (subkey, value) in enumerate(peers_wrote.items()):
        found.store(subkey, value, clock.now + 50 + more_s)
    assert cache.store(KEY, found, clock.now + 50)
    assert entries(cache) == {"a": b"one", "d": b"three"}
    assert not cache.store(KEY, b"plain", clock.now + 90)
    assert not cache.store(KEY, b"four", clock.now + 90, subkey="a")
    again = DictionaryDHTValue()
    again.store("b", b"new", clock.now + 60)
    assert cache.store(KEY, again, clock.now + 60) and entries(cache) == {"b": b"new"}
    assert not cache.store(KEY, DictionaryDHTValue(), clock.now + 60)


async def write(writer: Node, to: Node, subkey: bytes, value: bytes, *, in_cache: bool = False) -> bool:
    """What any peer may send: one value under the first block."""
    stub = writer.dht.protocol.get_stub(PeerID.from_base58(to.peer_id))
    request = dht_pb2.StoreRequest(
        keys=[KEY.to_bytes()],
        subkeys=[subkey],
        values=[value],
        expiration_time=[time.time() + 3600],
        in_cache=[in_cache],
    )
    return list((await stub.rpc_store(request)).store_ok) == [True]


@pytest.mark.swarm
@pytest.mark.parametrize(
    ("subkey", "in_cache"),
    [
        (PLAIN, False),
        (PLAIN, True),
        (MSGPackSerializer.dumps("x"), True),
    ],
)
async def test_one_write_does_not_hide_the_servers_of_a_block(subkey: bytes, in_cache: bool) -> None:
    """Neither a plain value in the place of their entries nor something in the cache that lives longer."""
    async with node() as first, node(await joining(first, client_mode=True)) as client:
        uids = [make_uid("m", 0)]
        assert await first.store(uids, first.peer_id, RECORD.to_wire(), time.time() + 60, 10) == []
        assert not await write(client, first, subkey, MSGPackSerializer.dumps(1), in_cache=in_cache)
        view = await read_view(client, "m", 1, timeout_s=10)
        assert list(view.blocks[0]) == [first.peer_id]


@pytest.mark.swarm
async def test_a_value_that_is_too_large_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node without bounds has it; whoever asks that node reads the records beside it."""
    async with node() as first, node(await joining(first, client_mode=True)) as client:
        monkeypatch.setattr(first.dht.protocol, "storage", DHTLocalStorage())
        uids = [make_uid("m", 0)]
        assert await first.store(uids, first.peer_id, RECORD.to_wire(), time.time() + 60, 10) == []
        large = MSGPackSerializer.dumps("x" * 300_000)
        assert first.dht.protocol.storage.store(KEY, large, time.time() + 60, subkey="Qm" + "x" * 44)
        view = await read_view(client, "m", 1, timeout_s=10)
        assert list(view.blocks[0]) == [first.peer_id]


def test_records_of_the_longest_period_are_kept() -> None:
    """What may be configured is not refused by our own nodes, with an hour for clocks that differ."""
    config = load_config(None, {}, ["model.source=a/b", "swarm.update_period_s=7200"]).config
    lifetime_s = AnnouncerOptions("m", 1, update_period_s=config.swarm.update_period_s).lifetime_s
    assert lifetime_s + 3600 <= LIMITS.max_lifetime_s
