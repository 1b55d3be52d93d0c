"""Sessions that wait for their clients, who is asked to take one, and how a client is told where one went."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalsd.engine.step import SessionSpec
from petalsd.errors import BadRequest, NotServed, Overloaded, SessionClosed, SessionMoved
from petalsd.swarm.directory import SwarmView
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.swarm.session_giver import takers
from petalsd.swarm.stream import RemoteError
from petalsd.swarm.tickets import TicketOffice
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel, serving
from tests.waiting import eventually

GHOST = "Qm" + "g" * 44


async def test_a_session_that_nobody_comes_for_is_ended(tmp_path: Path) -> None:
    """After its time its pages are back, and so are those of the rest when the office closes."""
    spec = SessionSpec(BlockSpan(0, 4), 1, 32, GHOST)
    async with serving(TinyModel(tmp_path)) as engine:
        office = TicketOffice(lifetime_s=0.02, max_held=1)
        ticket = office.issue(await engine.open_session(spec))
        with pytest.raises(Overloaded):
            office.check_room()
        await eventually(lambda: len(office) == 0 and engine.stats().sessions == 0)
        with pytest.raises(NotServed):
            office.claim(ticket, spec)
        office = TicketOffice(lifetime_s=60)
        office.issue(await engine.open_session(spec))
        office.close("the server is stopping")
        assert engine.stats().sessions == 0


async def test_a_session_that_ended_meanwhile_says_why(tmp_path: Path) -> None:
    """A claim of other terms leaves it there; the right one gets it, with the reason of its end."""
    spec = SessionSpec(BlockSpan(0, 4), 1, 32, GHOST)
    async with serving(TinyModel(tmp_path)) as engine:
        office = TicketOffice(lifetime_s=60)
        ticket = office.issue(await engine.open_session(spec))
        engine.end_work("the blocks went")
        with pytest.raises(BadRequest, match="session_ticket"):
            office.claim(ticket, SessionSpec(BlockSpan(0, 3), 1, 32, GHOST))
        session = office.claim(ticket, spec)
        assert session.end_reason == "the blocks went"
        with pytest.raises(SessionClosed):
            await session.write_kv(None, None)  # type: ignore[arg-type]


def test_who_is_asked_to_take_a_session() -> None:
    """Servers of petalsd that hold all of its blocks, those with room first; never ourselves."""
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
    assert [remote.peer[2] for remote in takers(view, "Qm" + "o" * 44, spec)] == ["a", "f"]


def test_the_text_of_a_redirect_is_read_back() -> None:
    """And nothing else is taken for one."""
    moved = SessionMoved(GHOST, "t-_" + "x" * 40)
    read = SessionMoved.parse(str(moved))
    assert read is not None and (read.peer, read.ticket) == (moved.peer, moved.ticket)
    error = RemoteError("peer", str(moved))
    assert (error.remote_code, error.moved is not None, moved.ticket in str(error)) == (
        "session_moved",
        True,
        False,
    )
    assert SessionMoved.parse(f"{moved} and more") is None
    assert SessionMoved.parse("session_closed: the server is stopping") is None
