"""Rows 2 to 6, 20 and 22 of the checklist: what is written into the DHT, when, and until when."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from petalsd.errors import SwarmError
from petalsd.swarm.announcer import Announcer, AnnouncerOptions, RecordMaker
from petalsd.swarm.dht_storage import LIMITS
from petalsd.swarm.directory import SwarmView, parse_entries, read_view
from petalsd.swarm.node import DHTEntry, NodeOptions
from petalsd.swarm.protocol import MODELS_KEY, ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan
from tests.swarm.servers import joining, node
from tests.waiting import eventually

OWN = "Qm" + "o" * 44
NEXT = "Qm" + "n" * 44
ONLINE, JOINING, OFFLINE = ServerState.ONLINE, ServerState.JOINING, ServerState.OFFLINE


class FakeDHT:
    """Stores as hivemind does: a later expiration wins, an earlier or equal one is refused."""

    peer_id = OWN

    def __init__(self) -> None:
        self.entries: dict[str, dict[object, DHTEntry]] = {}
        self.writes: list[tuple[str, str, object, float]] = []
        self.is_reachable = True
        self.num_refused = self.num_reads = 0

    async def store(
        self, keys: list[str], subkey: str, value: object, expiration: float, timeout_s: float
    ) -> list[str]:
        refused = []
        for key in keys:
            known = self.entries.setdefault(key, {})
            if not self.is_reachable or (subkey in known and known[subkey].expiration >= expiration):
                refused.append(key)
                self.num_refused += 1
                continue
            known[subkey] = DHTEntry(value, expiration)
            self.writes.append((key, subkey, value, expiration))
        return refused

    async def get(self, keys: list[str], timeout_s: float) -> dict[str, dict[object, DHTEntry]]:
        self.num_reads += 1
        return {key: dict(self.entries.get(key, {})) for key in keys}

    async def ping(self, peer: str) -> float:
        return 0.25

    def states(self) -> list[tuple[str, ServerState]]:
        """What was written under blocks, in order."""
        return [(key, ServerState(value[0])) for key, _, value, _ in self.writes if key != MODELS_KEY]

    def record(self, key: str) -> ServerRecord:
        return parse_entries(key, self.entries[key])[OWN]


def make_record(state: ServerState, span: BlockSpan) -> ServerRecord:
    return ServerRecord(state, 10, inference_rps=40, cache_tokens_left=2 * 512, version="0.1.0")


def announcer(
    dht: FakeDHT, prefix: str = "m-hf", period_s: float = 120.0, make: RecordMaker = make_record
) -> Announcer:
    options = AnnouncerOptions(prefix, 6, "https://huggingface.co/x/m", update_period_s=period_s)
    return Announcer(dht, options, make)  # type: ignore[arg-type]


async def test_rows_2_to_6_one_exact_record_under_every_own_block() -> None:
    """Floats, exact span, unscaled rates and a base58 subkey, the same under each block, when it returns."""
    dht = FakeDHT()
    await announcer(dht).announce(ONLINE, BlockSpan(1, 3))
    assert dht.states() == [("m-hf.1", ONLINE), ("m-hf.2", ONLINE)]
    (_, subkey, value, _), (_, _, same, _), _ = dht.writes
    assert subkey == OWN and isinstance(value, tuple) and value == same
    assert (
        type(value[1]) is float
        and value[2]["inference_rps"] == 40.0
        and value[2]["cache_tokens_left"] == 1024
    )
    assert (value[2]["start_block"], value[2]["end_block"]) == (1, 3)


async def test_row_5_old_blocks_go_offline_before_new_ones_are_declared() -> None:
    """A change of span writes OFFLINE under the blocks that are left first; the others get the new record."""
    dht = FakeDHT()
    ours = announcer(dht)
    await ours.announce(ONLINE, BlockSpan(0, 2))
    await ours.announce(JOINING, BlockSpan(1, 3))
    assert dht.states()[2:] == [
        ("m-hf.0", OFFLINE),
        ("m-hf.1", JOINING),
        ("m-hf.2", JOINING),
    ]
    assert dht.record("m-hf.0").span == BlockSpan(0, 1)


async def test_a_move_announces_what_stays_what_comes_and_what_is_left() -> None:
    """Each part in its state with its own claim; all are renewed, and readers see the part that serves."""
    dht = FakeDHT()
    ours = announcer(dht, make=lambda state, span: ServerRecord(state, 1 / len(span)))
    await ours.announce(ONLINE, BlockSpan(1, 4))
    dht.writes.clear()
    await ours.announce_parts(
        [(JOINING, BlockSpan(0, 1)), (JOINING, BlockSpan(3, 4)), (ONLINE, BlockSpan(1, 3))]
    )
    parts = [("m-hf.0", JOINING), ("m-hf.3", JOINING), ("m-hf.1", ONLINE), ("m-hf.2", ONLINE)]
    assert dht.states() == parts
    await ours.renew()
    assert dht.states() == parts * 2
    assert dht.record("m-hf.3").span == BlockSpan(3, 4)
    await ours.announce_parts([(JOINING, BlockSpan(4, 5)), (ONLINE, BlockSpan(2, 3))], BlockSpan(2, 5))
    assert [dht.record(f"m-hf.{block}").span for block in (4, 2)] == [BlockSpan(2, 5), BlockSpan(2, 3)]
    assert {dht.record(f"m-hf.{block}").throughput for block in (4, 2)} == {
        1 / 3
    }  # of all that will be served
    assert dht.states()[8:11] == [("m-hf.0", OFFLINE), ("m-hf.3", OFFLINE), ("m-hf.1", OFFLINE)]
    blocks = [parse_entries(key, dht.entries.get(key, {})) for key in (f"m-hf.{block}" for block in range(6))]
    (seen,) = SwarmView("m-hf", 6, blocks).spans(JOINING)
    assert (seen.state, seen.span) == (ONLINE, BlockSpan(2, 3))


async def test_a_span_says_since_when_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while parts of it are on their way, nor is it later with each renewal."""
    now = iter(range(1000, 2000, 10))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    dht, since = FakeDHT(), list[float | None]()
    ours = announcer(dht)
    await ours.announce_parts([(JOINING, BlockSpan(2, 3)), (ONLINE, BlockSpan(1, 2))], BlockSpan(1, 3))
    since.append(dht.record("m-hf.1").online_since)
    await ours.announce(ONLINE, BlockSpan(1, 3))
    since.append(dht.record("m-hf.1").online_since)
    await ours.announce(ONLINE, BlockSpan(1, 3))
    await ours.renew()
    since.append(dht.record("m-hf.2").online_since)
    assert since[0] is None and since[1] is not None and since[1] == since[2]


async def test_blocks_that_are_served_all_the_while_never_go_offline() -> None:
    """From ONLINE to ONLINE only the blocks that are left are declared OFFLINE, before the new ones."""
    dht = FakeDHT()
    ours = announcer(dht)
    await ours.announce(ONLINE, BlockSpan(0, 3))
    await ours.announce(ONLINE, BlockSpan(1, 4))
    await ours.announce(ONLINE, BlockSpan(0, 4))
    assert dht.states()[3:] == [
        ("m-hf.0", OFFLINE),
        *((f"m-hf.{block}", ONLINE) for block in (1, 2, 3)),
        *((f"m-hf.{block}", ONLINE) for block in (0, 1, 2, 3)),
    ]
    assert dht.record("m-hf.1").span == BlockSpan(0, 4)


async def test_row_5_a_stop_writes_offline_once() -> None:
    """The blocks go OFFLINE without pings."""
    dht = FakeDHT()
    ours = announcer(dht)
    await ours.announce(ONLINE, BlockSpan(0, 1))
    await ours.announce(OFFLINE, BlockSpan(0, 1))
    assert dht.states() == [("m-hf.0", ONLINE), ("m-hf.0", OFFLINE)]
    assert dht.record("m-hf.0").next_pings is None


async def test_row_5_every_entry_outlives_the_one_before() -> None:
    """Expirations grow strictly, and a period of 120 s keeps a record for 240 s."""
    dht = FakeDHT()
    ours = announcer(dht)
    for state in (JOINING, ONLINE, ONLINE, OFFLINE):
        await ours.announce(state, BlockSpan(0, 1))
    expirations = [expiration for key, _, _, expiration in dht.writes if key == "m-hf.0"]
    assert expirations == sorted(set(expirations)) and len(expirations) == 4
    assert 239 < expirations[0] - time.time() <= 240


async def test_row_5_a_longer_entry_from_before_a_restart_is_outlived() -> None:
    """An entry of ours that expires later than usual does not hide the new one."""
    dht = FakeDHT()
    longer = time.time() + 1000
    dht.entries["m-hf.0"] = {OWN: DHTEntry((2, 1.0, {}), longer)}
    await announcer(dht).announce(JOINING, BlockSpan(0, 1))
    assert dht.record("m-hf.0").state == JOINING
    assert longer < dht.entries["m-hf.0"][OWN].expiration < longer + 1


@pytest.mark.swarm
async def test_whatever_a_node_keeps_under_our_name_is_outlived() -> None:
    """Written by anybody, or by ourselves before our clock was set back: we would be missing for hours."""
    async with node() as ours, node(await joining(ours, client_mode=True)) as other:
        hours = time.time() + LIMITS.max_lifetime_s - 5
        assert await other.store(["m-hf.0"], ours.peer_id, (0, 1.0, {}), hours, 10) == []
        await Announcer(ours, AnnouncerOptions("m-hf", 1), make_record).announce(ONLINE, BlockSpan(0, 1))
        (records,) = (await read_view(other, "m-hf", 1)).blocks
        assert records[ours.peer_id].state == ONLINE


async def test_an_entry_for_years_is_not_followed() -> None:
    """Anyone may write under our name; a ghost that lasts for years must not be made ours."""
    dht = FakeDHT()
    dht.entries["m-hf.0"] = {OWN: DHTEntry((2, 1.0, {}), time.time() + 1e8)}
    with pytest.raises(SwarmError, match="1 of 1 blocks"):
        await announcer(dht).announce(ONLINE, BlockSpan(0, 1))


async def test_nothing_stored_is_an_error() -> None:
    """announce returns only when the record is stored, so an unreachable swarm raises."""
    dht = FakeDHT()
    dht.is_reachable = False
    with pytest.raises(SwarmError, match="2 of 2 blocks"):
        await announcer(dht).announce(ONLINE, BlockSpan(0, 2))


async def test_blocks_that_were_left_are_told_of_until_it_is_stored() -> None:
    """A swarm that does not take it at that moment would send clients to them until the old record expires."""
    dht = FakeDHT()
    ours = announcer(dht)
    await ours.announce(ONLINE, BlockSpan(0, 3))
    dht.is_reachable = False
    for span in (BlockSpan(1, 4), BlockSpan(2, 5)):
        with pytest.raises(SwarmError):
            await ours.announce(ONLINE, span)
    dht.is_reachable = True
    dht.writes.clear()
    await ours.renew()
    assert dht.states() == [
        ("m-hf.0", OFFLINE),
        ("m-hf.1", OFFLINE),
        *((f"m-hf.{block}", ONLINE) for block in (2, 3, 4)),
    ]
    dht.writes.clear()
    await ours.renew()
    assert [state for _, state in dht.states()] == [ONLINE] * 3


async def test_blocks_that_are_served_again_are_not_called_left() -> None:
    """Whatever could not be told of them in between."""
    dht = FakeDHT()
    ours = announcer(dht)
    await ours.announce(ONLINE, BlockSpan(0, 3))
    dht.is_reachable = False
    with pytest.raises(SwarmError):
        await ours.announce(ONLINE, BlockSpan(2, 3))
    dht.is_reachable = True
    dht.writes.clear()
    await ours.announce(ONLINE, BlockSpan(1, 3))
    assert dht.states() == [("m-hf.0", OFFLINE), ("m-hf.1", ONLINE), ("m-hf.2", ONLINE)]


async def test_row_20_the_model_is_listed_with_all_its_blocks() -> None:
    """_petals.models gets the model's total and its repository, while we are not OFFLINE."""
    dht = FakeDHT()
    ours = announcer(dht)
    await ours.announce(ONLINE, BlockSpan(0, 1))
    listed = dht.entries[MODELS_KEY]["m-hf"]
    assert listed.value == {"num_blocks": 6, "repository": "https://huggingface.co/x/m"}
    await ours.announce(OFFLINE, BlockSpan(0, 1))
    assert dht.entries[MODELS_KEY]["m-hf"] == listed


async def test_row_20_a_private_model_is_not_listed() -> None:
    """A prefix with an underscore in front stays out of _petals.models."""
    dht = FakeDHT()
    await announcer(dht, prefix="_mine").announce(ONLINE, BlockSpan(0, 1))
    assert MODELS_KEY not in dht.entries


async def test_row_22_renewing_writes_a_lost_record_again() -> None:
    """Whether or not the DHT still has it, the current entry is written anew, with fresh pings."""
    dht = FakeDHT()
    ours = announcer(dht)
    await ours.announce(ONLINE, BlockSpan(0, 2))
    dht.entries.clear()
    dht.entries["m-hf.2"] = {NEXT: DHTEntry((2, 1.0, {}), time.time() + 60)}
    await ours.renew()
    assert dht.record("m-hf.1").next_pings == {NEXT: 0.25}


async def test_nothing_is_renewed_before_it_is_announced() -> None:
    """A renewal without an announcement writes nothing."""
    dht = FakeDHT()
    await announcer(dht).renew()
    assert dht.writes == []


async def test_news_are_written_before_their_time() -> None:
    """Between renewals a record is written again when it says something else, and only then."""
    dht = FakeDHT()
    left = [1000]
    ours = announcer(dht, make=lambda state, span: ServerRecord(state, 10, cache_tokens_left=left[0]))
    await ours.write_news()
    await ours.announce(ONLINE, BlockSpan(0, 1))
    left[0] = 800
    await ours.write_news()
    assert len(dht.states()) == 1
    left[0] = 700
    await ours.write_news()
    await ours.write_news()
    assert len(dht.states()) == 2 and dht.record("m-hf.0").cache_tokens_left == 700
    await ours.announce(OFFLINE, BlockSpan(0, 1))
    left[0] = 0
    await ours.write_news()
    assert len(dht.states()) == 3


async def test_a_started_announcer_writes_news_by_itself_and_not_at_once() -> None:
    """Long before the next renewal, but no sooner than a quarter of the period after the last writing."""
    dht = FakeDHT()
    rate = [10.0]
    ours = announcer(dht, period_s=2.0, make=lambda state, span: ServerRecord(state, rate[0]))
    await ours.announce(ONLINE, BlockSpan(0, 1))
    begun = time.monotonic()
    ours.start()
    rate[0] = 20.0
    await eventually(lambda: len(dht.states()) > 1)
    await ours.stop()
    assert dht.num_reads == 0, "that was a renewal, which looks for servers to ping first"
    assert time.monotonic() - begun >= 0.5 and dht.record("m-hf.0").throughput == 20.0


async def test_a_store_that_fails_is_tried_again_until_it_is_done() -> None:
    """While the swarm is away the announcer goes on trying, with pauses that grow up to a minute."""
    dht = FakeDHT()
    ours = announcer(dht, period_s=0.05)
    dht.is_reachable = False
    with pytest.raises(SwarmError):
        await ours.announce(ONLINE, BlockSpan(0, 1))
    ours.start()
    await eventually(lambda: dht.num_refused > 4)
    dht.is_reachable = True
    await eventually(lambda: dht.states() != [])
    await ours.stop()
    assert dht.record("m-hf.0").state == ONLINE
    pauses = [AnnouncerOptions("m", 6).retry_s(number) for number in range(1, 9)]
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


async def test_a_record_that_cannot_be_made_silences_nobody() -> None:
    """A bug where records come from is logged, and the next attempt comes all the same."""
    dht = FakeDHT()
    rates = [10.0]
    ours = announcer(
        dht, period_s=0.05, make=lambda state, span: ServerRecord(state, 10, inference_rps=rates[0])
    )
    await ours.announce(ONLINE, BlockSpan(0, 1))
    rates[0] = 0.0
    ours.start()
    await eventually(lambda: dht.num_reads > 3)
    rates[0] = 20.0
    await eventually(lambda: dht.record("m-hf.0").inference_rps == 20.0)
    await ours.stop()


@pytest.mark.swarm
async def test_row_22_a_swarm_that_forgot_us_is_told_again(tmp_path: Path) -> None:
    """Its only other node comes back without a memory: after a renewal it has our record, with us or without."""
    options = NodeOptions(identity_path=tmp_path / "key")
    async with node(options) as first, node(await joining(first)) as server:
        (maddr,) = await first.visible_maddrs()
        ours = Announcer(server, AnnouncerOptions("m-hf", 2), make_record)
        await ours.announce(ONLINE, BlockSpan(0, 2))
        await first.stop()
        async with node(replace(options, host_maddrs=(maddr.partition("/p2p/")[0],))) as again:
            assert (await read_view(again, "m-hf", 2)).spans() == []
            await eventually(server.is_in_touch, timeout_s=30, interval_s=0.2)
            await eventually(lambda: _renewed(ours), timeout_s=30, interval_s=0.2)
            peer_id = server.peer_id
            await server.stop()
            (found,) = (await read_view(again, "m-hf", 2)).spans()
        assert (found.peer, found.state, found.span) == (peer_id, ONLINE, BlockSpan(0, 2))


async def _renewed(ours: Announcer) -> bool:
    """The DHT leaves out a peer for seconds after it did not answer."""
    try:
        await ours.renew()
    except SwarmError:
        return False
    return True
