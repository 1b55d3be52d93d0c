"""Sessions that wait for their clients, who is asked to take one, and how a client is told where one went."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from petalsd.engine.step import SessionSpec
from petalsd.errors import BadRequest, DeadlineExceeded, NotServed, SessionClosed, SessionMoved
from petalsd.swarm.directory import SwarmView
from petalsd.swarm.escrow import NOTHING, Amount, Escrow, EscrowFull, EscrowLimits, Outcome
from petalsd.swarm.givers import KnownGivers, UnknownGiver
from petalsd.swarm.handover import KVShape, Offer
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.swarm.session_giver import Refusals, takers
from petalsd.swarm.stream import RemoteError
from petalsd.swarm.tickets import TicketOffice
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel, serving
from tests.swarm.conftest import GHOST
from tests.swarm.test_observer import Notes
from tests.waiting import eventually


def escrow(num_per_giver: int = 2, num_of_all: int = 3) -> Escrow:
    """Of a server with 8 rows and 80 pages: a giver may have 2 rows and 20 pages, all of them 4 and 40."""
    return Escrow(lambda: Amount(0, 8, 80), EscrowLimits(num_per_giver, num_of_all))


ONE = Amount(1, 1, 10)


async def test_a_session_that_nobody_comes_for_is_ended(tmp_path: Path) -> None:
    """After its time its pages are back, its giver is charged no more, and so for the rest at the close."""
    spec = SessionSpec(BlockSpan(0, 4), 1, 32, GHOST)
    holding, notes = escrow(), Notes()
    async with serving(TinyModel(tmp_path)) as engine:
        office = TicketOffice(0.02, notes)
        ticket = office.issue(await engine.open_session(spec, "giver"), holding.take_in("giver", ONE))
        await eventually(lambda: len(office) == 0 and engine.stats().sessions == 0)
        assert (holding.held, notes.hand_overs) == (NOTHING, [Outcome.EXPIRED])
        with pytest.raises(NotServed):
            office.claim(ticket, spec)
        office = TicketOffice(60, notes)
        office.issue(await engine.open_session(spec, "giver"), holding.take_in("giver", ONE))
        office.close("the server is stopping")
        assert (engine.stats().sessions, holding.held) == (0, NOTHING)
        assert notes.hand_overs == [Outcome.EXPIRED, Outcome.ENDED]


@pytest.mark.parametrize("grace_s", [0.02, 60.0])
async def test_a_server_that_leaves_blocks_gives_clients_little_time(tmp_path: Path, grace_s: float) -> None:
    """From the session's arrival on, which may be over already; one on blocks that stay has the time it had."""
    spans, notes = [BlockSpan(0, 4), BlockSpan(1, 3)], Notes()
    async with serving(TinyModel(tmp_path)) as engine:
        office = TicketOffice(60, notes, grace_s)
        specs = [SessionSpec(span, 1, 16, GHOST) for span in spans]
        tickets = [
            office.issue(await engine.open_session(spec, "giver"), escrow().take_in("giver", ONE))
            for spec in specs
        ]
        for _ in range(2):
            office.hasten(BlockSpan(1, 4))
        if grace_s < 1:
            await eventually(lambda: engine.work_outside(BlockSpan(1, 4)) == 0)
            with pytest.raises(NotServed):
                office.claim(tickets[0], specs[0])
        else:
            await office.claim(tickets[0], specs[0]).close()
        await office.claim(tickets[1], specs[1]).close()
        assert notes.hand_overs == [Outcome.EXPIRED if grace_s < 1 else Outcome.CLAIMED, Outcome.CLAIMED]


async def test_a_session_that_ended_meanwhile_says_why(tmp_path: Path) -> None:
    """A claim of other terms leaves it there; the right one gets it, with the reason of its end."""
    spec = SessionSpec(BlockSpan(0, 4), 1, 32, GHOST)
    notes = Notes()
    async with serving(TinyModel(tmp_path)) as engine:
        office = TicketOffice(60, notes)
        ticket = office.issue(await engine.open_session(spec, "giver"), escrow().take_in("giver", ONE))
        engine.end_work("the blocks went")
        with pytest.raises(BadRequest, match="session_ticket"):
            office.claim(ticket, SessionSpec(BlockSpan(0, 3), 1, 32, GHOST))
        with pytest.raises(BadRequest, match=r"opened for .* no adapter"):
            office.claim(ticket, replace(spec, adapter="poet"))
        session = office.claim(ticket, spec)
        assert (session.end_reason, notes.hand_overs) == ("the blocks went", [Outcome.ENDED])
        with pytest.raises(SessionClosed):
            await session.write_kv(None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "more",
    [ONE._replace(pages=11), ONE._replace(rows=2), ONE],
    ids=["pages", "rows", "sessions"],
)
def test_what_a_giver_may_leave_is_bounded(more: Amount) -> None:
    """In pages, rows and number, whatever it gives back in between; its first session alone may be larger."""
    holding = escrow(num_per_giver=1 if more is ONE else 2)
    first = holding.take_in("giver", ONE)
    with pytest.raises(EscrowFull, match="of yours, 1 sessions, 1 rows and 10 pages wait"):
        holding.take_in("giver", more)
    assert holding.held == ONE
    first.release()
    first.release()
    holding.take_in("giver", Amount(1, 4, 40))
    with pytest.raises(EscrowFull, match="of all givers, 1 sessions"):
        holding.take_in("another", Amount(1, 1, 1))


def test_what_all_givers_may_leave_is_bounded() -> None:
    """However many of them there are: the rest is for clients that are here."""
    holding = escrow(num_of_all=3)
    deposits = [holding.take_in(f"giver {number}", Amount(1, 1, 1)) for number in range(3)]
    with pytest.raises(EscrowFull, match="at most 3 sessions, 4 rows and 40 pages may"):
        holding.take_in("giver 4", Amount(1, 1, 1))
    deposits[0].release()
    holding.take_in("giver 4", Amount(1, 1, 1))


async def test_only_servers_of_the_blocks_may_give() -> None:
    """In whatever state; one reading of the directory is enough for a while, whoever asks."""
    now, views = [0.0], [listing("Qa", ServerState.OFFLINE)]
    readings: list[float] = []

    async def read() -> SwarmView:
        readings.append(now[0])
        return views[-1]

    givers = KnownGivers(read, lambda: now[0])
    await givers.check("Qa", BlockSpan(1, 3))
    for span in (BlockSpan(0, 2), BlockSpan(2, 5)):
        with pytest.raises(UnknownGiver, match="giver = 'Qa'"):
            await givers.check("Qa", span)
    with pytest.raises(UnknownGiver):
        await givers.check("Qb", BlockSpan(1, 2))
    assert readings == [0.0]
    now[0] = 6.0
    views.append(listing("Qb", ServerState.ONLINE))
    await givers.check("Qb", BlockSpan(1, 3))
    now[0] = 60.0
    await givers.check("Qb", BlockSpan(1, 3))
    assert readings == [0.0, 6.0]
    now[0] = 67.0
    await givers.check("Qb", BlockSpan(1, 3))
    assert readings == [0.0, 6.0, 67.0]


async def test_a_directory_that_cannot_be_read_is_not_read_by_each_who_asks() -> None:
    """All who ask meanwhile are told of that one attempt, also when the first of them gives up."""
    now, started, go_on = [0.0], [0], asyncio.Event()

    async def read() -> SwarmView:
        started[0] += 1
        await go_on.wait()
        raise DeadlineExceeded("reading took too long")

    givers = KnownGivers(read, lambda: now[0])
    asking = [asyncio.create_task(givers.check(f"Q{number}", BlockSpan(1, 2))) for number in range(50)]
    await asyncio.sleep(0)
    asking[0].cancel()
    go_on.set()
    async with asyncio.timeout(5):
        told = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(told[0], asyncio.CancelledError)
    assert all(isinstance(error, DeadlineExceeded) for error in told[1:])
    now[0] = 4.0
    with pytest.raises(DeadlineExceeded):
        await givers.check("Qa", BlockSpan(1, 2))
    assert started == [1]
    now[0] = 6.0
    with pytest.raises(DeadlineExceeded):
        await givers.check("Qa", BlockSpan(1, 2))
    assert started == [2]


def listing(peer: str, state: ServerState) -> SwarmView:
    """A directory with one server, of blocks 1 to 3 of four."""
    record = ServerRecord(state, 1.0, BlockSpan(1, 4))
    return SwarmView("tiny", 4, [{}, {peer: record}, {peer: record}, {peer: record}])


def test_who_is_asked_to_take_a_session() -> None:
    """Servers of petalsd that hold all of its blocks and its adapter, those with room first; never ourselves."""
    spec = SessionSpec(BlockSpan(2, 4), 1, 100, "client")
    whole = BlockSpan(0, 4)
    records = {
        "Qm" + letter * 44: ServerRecord(state, 1.0, span, version=version, cache_tokens_left=left)
        for letter, state, span, version, left in [
            ("f", ServerState.ONLINE, whole, "petalsd 1", 399),
            ("a", ServerState.ONLINE, whole, "petalsd 1", 400),
            ("o", ServerState.ONLINE, whole, "petalsd 1", 4000),
            ("s", ServerState.ONLINE, whole, "2.3.0.dev2", 4000),
            ("j", ServerState.JOINING, whole, "petalsd 1", 4000),
            ("p", ServerState.ONLINE, BlockSpan(0, 3), "petalsd 1", 4000),
        ]
    }
    blocks = [
        {peer: record for peer, record in records.items() if record.span and block in record.span}
        for block in range(4)
    ]
    view = SwarmView("tiny", 4, blocks)
    assert [remote.peer[2] for remote in takers(view, "Qm" + "o" * 44, spec, Refusals())] == ["a", "f"]
    assert not takers(view, "Qm" + "o" * 44, replace(spec, adapter="poet"), Refusals())
    for held in blocks:
        held.update({peer: replace(record, adapters=("poet",)) for peer, record in held.items()})
    view = SwarmView("tiny", 4, blocks)
    spec = replace(spec, adapter="poet")
    assert [remote.peer[2] for remote in takers(view, "Qm" + "o" * 44, spec, Refusals())] == ["a", "f"]


def test_who_refused_lately_is_asked_last() -> None:
    """Servers that announce room and take nothing keep the others from being asked for a minute at most."""
    now = [0.0]
    spec, whole = SessionSpec(BlockSpan(0, 4), 1, 100, "client"), BlockSpan(0, 4)
    room = {"a": 9000, "b": 9000, "c": 9000, "full": 0}
    records = {
        peer: ServerRecord(ServerState.ONLINE, 1.0, whole, version="petalsd 1", cache_tokens_left=left)
        for peer, left in room.items()
    }
    view, refusals = SwarmView("tiny", 4, [records] * 4), Refusals(lambda: now[0])

    def order() -> list[str]:
        return [remote.peer for remote in takers(view, "we", spec, refusals)]

    assert sorted(order()[:3]) == ["a", "b", "c"]
    for peer in "abc":
        refusals.note(peer)
    assert order()[0] == "full"
    now[0] = 50.0
    refusals.note("full")
    assert order()[3] == "full"
    now[0] = 61.0
    refusals.note("a")
    assert sorted(order()[:2]) == ["b", "c"] and sorted(order()[2:]) == ["a", "full"]
    assert len(refusals._until_s) == 2


def test_the_text_of_a_redirect_is_read_back() -> None:
    """And nothing else is taken for one."""
    moved = SessionMoved(GHOST, "t-_" + "x" * 40)
    read = SessionMoved.parse(str(moved))
    assert read is not None and (read.peer, read.ticket) == (moved.peer, moved.ticket)
    error = RemoteError("peer", str(moved))
    assert error.moved is not None and "session_moved: " in str(error) and moved.ticket not in str(error)
    assert SessionMoved.parse(f"{moved} and more") is None
    assert SessionMoved.parse("session_closed: the server is stopping") is None


@pytest.mark.parametrize("adapter", [None, "poet"])
def test_an_offer_says_everything_that_the_session_is(adapter: str | None) -> None:
    """The taker goes on with the same adapter, or none."""
    offer = Offer(SessionSpec(BlockSpan(1, 3), 2, 32, GHOST, adapter=adapter), KVShape(2, 16, torch.float32))
    assert Offer.parse(offer.to_wire("tiny"), "tiny") == offer
