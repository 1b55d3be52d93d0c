"""Spans put together from records, by the rules that stock clients use."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import cast

import pytest

from petalsd.swarm import directory
from petalsd.swarm.directory import SwarmView, parse_entries, read_view
from petalsd.swarm.node import DHTEntry, Node
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan

ONLINE, JOINING, OFFLINE = ServerState.ONLINE, ServerState.JOINING, ServerState.OFFLINE


def record(
    state: ServerState = ONLINE, span: BlockSpan | None = None, throughput: float = 1.0
) -> ServerRecord:
    return ServerRecord(state, throughput, span=span)


def view(*blocks: dict[str, ServerRecord]) -> SwarmView:
    return SwarmView("m", len(blocks), blocks)


def spans(view: SwarmView, state: ServerState = ONLINE) -> dict[str, tuple[int, int]]:
    return {remote.peer: (remote.span.start, remote.span.end) for remote in view.spans(state)}


def test_a_servers_blocks_make_its_span() -> None:
    """Entries in consecutive blocks are one span; without claimed ends a gap is papered over."""
    a = record()
    assert spans(view({"a": a}, {"a": a}, {}, {"b": a})) == {"a": (0, 2), "b": (3, 4)}
    assert spans(view({"a": a}, {}, {"a": a})) == {"a": (0, 3)}


def test_claimed_ends_win_over_the_blocks_listed() -> None:
    """One entry that claims 0:6 is a span 0:6, cut to the model."""
    assert spans(view({}, {"a": record(span=BlockSpan(0, 6))}, {}, {})) == {"a": (0, 4)}
    assert spans(view({"a": record(span=BlockSpan(7, 9))}, {})) == {"a": (0, 1)}


def test_the_better_state_counts() -> None:
    """A server's ONLINE entry replaces what its JOINING entries said, and states below are skipped."""
    old, new = record(JOINING, BlockSpan(0, 2)), record(ONLINE, BlockSpan(1, 3))
    mixed = view({"a": old}, {"a": new}, {"a": new})
    assert spans(mixed) == {"a": (1, 3)}
    assert spans(mixed, JOINING) == {"a": (1, 3)}
    assert spans(view({"a": record(OFFLINE)})) == {}


def test_stale_and_fresh_entries_of_one_state_merge() -> None:
    """As in stock clients, a stale ONLINE entry further on extends the span: why OFFLINE comes before a move."""
    fresh, stale = record(ONLINE, BlockSpan(0, 2)), record(ONLINE, BlockSpan(2, 4))
    assert spans(view({"a": fresh}, {"a": fresh}, {"a": stale}, {"a": stale})) == {"a": (0, 4)}


def test_missing_blocks_are_those_in_no_span() -> None:
    """The view says which blocks nobody serves, and can leave out servers."""
    seen = view({"a": record()}, {"a": record()}, {}, {"b": record()})
    assert seen.missing_blocks() == [2]
    assert seen.without({"b"}).missing_blocks() == [2, 3]


PEER = "Qm" + "a" * 44
GOOD = (2, 1.0, {})


@pytest.mark.parametrize("subkey", [5, None, b"x", "short", "Qm" + "/" * 44])
def test_an_entry_under_a_strange_subkey_is_left_out(subkey: object) -> None:
    """A subkey that is no PeerID kills every stock client; ours skips it and keeps the rest (checklist 6)."""
    entries = {subkey: DHTEntry(GOOD, 1.0), PEER: DHTEntry(GOOD, 1.0)}
    assert list(parse_entries("m.0", entries)) == [PEER]


def test_a_bad_value_hides_no_other() -> None:
    """A record that cannot be read is left out alone."""
    entries = {PEER: DHTEntry(GOOD, 1.0), "Qm" + "b" * 44: DHTEntry({"x": 1}, 1.0)}
    assert list(parse_entries("m.0", entries)) == [PEER]


async def test_a_view_reads_every_block() -> None:
    """read_view asks for the uids of all blocks at once and parses what it gets."""

    class Directory:
        async def get(self, keys: list[str], timeout_s: float) -> dict[str, dict[object, DHTEntry]]:
            assert keys == ["m.0", "m.1"] and timeout_s == 5
            return {"m.0": {PEER: DHTEntry(GOOD, 1.0)}, "m.1": {}}

    seen = await read_view(Directory(), "m", 2, timeout_s=5)  # type: ignore[arg-type]
    assert spans(seen) == {PEER: (0, 1)}


@pytest.mark.parametrize(("num_entries", "is_beside"), [(10, False), (200, True)])
async def test_many_records_are_read_beside_the_loop(
    monkeypatch: pytest.MonkeyPatch, num_entries: int, is_beside: bool
) -> None:
    """60,000 of them, which anybody may write, take over a second; sessions go on meanwhile."""

    class Reader:
        async def get(self, keys: Sequence[str], timeout_s: float) -> dict[str, dict[object, DHTEntry]]:
            wire = ServerRecord(ONLINE, 1.0, BlockSpan(0, 1)).to_wire()
            return {key: {f"Qm{n:044d}": DHTEntry(wire, 9e9) for n in range(num_entries)} for key in keys}

    threads = []
    parse = directory.parse_entries

    def note(uid: str, entries: Mapping[object, DHTEntry]) -> dict[str, ServerRecord]:
        threads.append(threading.current_thread())
        return parse(uid, entries)

    monkeypatch.setattr(directory, "parse_entries", note)
    view = await read_view(cast(Node, Reader()), "m", 2)
    assert [len(records) for records in view.blocks] == [num_entries] * 2
    assert all((thread is not threading.main_thread()) == is_beside for thread in threads)
