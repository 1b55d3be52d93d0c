"""Records as they travel: what goes out is what stock readers accept, what comes in is judged field by field."""

from __future__ import annotations

import math

import pytest
from hivemind.utils.serializer import MSGPackSerializer

from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ModelRecord, ServerRecord
from petalsd.types import BlockSpan

RECORD = ServerRecord(
    ServerState.ONLINE,
    12.5,
    span=BlockSpan(2, 6),
    public_name="somebody",
    version="0.1.0",
    network_rps=100.0,
    forward_rps=300.0,
    inference_rps=20.0,
    torch_dtype="bfloat16",
    quant_type="none",
    using_relay=False,
    cache_tokens_left=4096,
    max_blocks=8,
    online_since=1.7e9,
    next_pings={"QmPeer": 0.05, "QmFar": math.inf},
)


def test_a_record_survives_the_wire() -> None:
    """Written, packed as hivemind packs it, unpacked and read, a record is the same."""
    assert (
        ServerRecord.from_wire(MSGPackSerializer.loads(MSGPackSerializer.dumps(RECORD.to_wire()))) == RECORD
    )


def test_numbers_go_out_as_plain_floats_and_ints() -> None:
    """Rates given as ints are written as floats, for an int makes stock readers drop the entry (checklist 2)."""
    state, throughput, extra = ServerRecord(
        ServerState.ONLINE, 10, inference_rps=7, forward_rps=3, network_rps=1, next_pings={"QmPeer": 1}
    ).to_wire()
    assert type(state) is int and type(throughput) is float
    assert all(type(extra[name]) is float for name in ("inference_rps", "forward_rps", "network_rps"))
    assert extra["next_pings"] == {"QmPeer": 1.0} and type(extra["adapters"]) is tuple


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_would_break_clients_is_never_written(rate: float) -> None:
    """inference_rps = 0.0 divides by zero in every stock client; it is refused on our side (checklist 2)."""
    with pytest.raises(ValueError, match="inference_rps"):
        ServerRecord(ServerState.ONLINE, 1.0, inference_rps=rate).to_wire()


@pytest.mark.parametrize("throughput", [math.inf, math.nan, -1.0])
def test_a_throughput_must_be_finite(throughput: float) -> None:
    """An unusable throughput is refused before it is written."""
    with pytest.raises(ValueError, match="throughput"):
        ServerRecord(ServerState.ONLINE, throughput).to_wire()


def test_the_span_is_written_exactly() -> None:
    """start_block and end_block are the span's ends (checklist 5)."""
    extra = RECORD.to_wire()[2]
    assert (extra["start_block"], extra["end_block"]) == (2, 6)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (5, "a server record"),
        ((2,), "a server record"),
        ((3, 1.0, {}), "3"),
        ((True, 1.0, {}), "state"),
        ((2, 10, {}), "throughput"),
        ((2, math.nan, {}), "throughput"),
        ((2, None, {}), "throughput"),
        ((2, 1.0, 5), "extra"),
        ((2, 1.0, {1: 2}), "extra"),
        ((2, 1.0, {"start_block": 1.0}), "start_block"),
        ((2, 1.0, {"end_block": -1}), "end_block"),
        ((2, 1.0, {"end_block": True}), "end_block"),
        ((2, 1.0, {"inference_rps": 5}), "inference_rps"),
        ((2, 1.0, {"adapters": None}), "adapters"),
        ((2, 1.0, {"adapters": "one"}), "adapters"),
        ((2, 1.0, {"cache_tokens_left": 1.5}), "cache_tokens_left"),
        ((2, 1.0, {"max_blocks": -1}), "max_blocks"),
        ((2, 1.0, {"online_since": 7}), "online_since"),
        ((2, 1.0, {"next_pings": {"QmPeer": 1}}), "next_pings"),
        ((2, 1.0, {"next_pings": {"QmPeer": math.nan}}), "next_pings"),
        ((2, 1.0, {"next_pings": []}), "next_pings"),
    ],
)
def test_a_bad_record_is_refused_with_the_field(value: object, what: str) -> None:
    """Each field that stock readers are strict about is checked as strictly, and named."""
    with pytest.raises(ValueError, match=what):
        ServerRecord.from_wire(value)


def test_reading_is_tolerant_where_stock_readers_are() -> None:
    """Lists, two elements, more elements, unknown keys and numbers as names are all fine."""
    assert ServerRecord.from_wire([2, 1.0]).span is None
    record = ServerRecord.from_wire((1, 0.0, {"version": 2.3, "future": [1]}, "more"))
    assert record.state == ServerState.JOINING and record.version == "2.3"
    assert ServerRecord.from_wire((2, 1.0, {"start_block": 4, "end_block": 4})).span is None


def test_the_model_record_says_how_many_blocks_the_model_has() -> None:
    """Dashboards read num_blocks and repository (checklist 20)."""
    assert ModelRecord(30).to_wire() == {"num_blocks": 30, "repository": None}
