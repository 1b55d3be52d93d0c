"""A giver against takers that do everything wrong: the next one gets the session, and no step waits long."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hivemind.proto import runtime_pb2

from petalsd.engine.handle import Session
from petalsd.errors import PetalsdError, SessionMoved
from petalsd.swarm import session_giver
from petalsd.swarm.directory import SwarmView
from petalsd.swarm.frames import take_over
from petalsd.swarm.handover import Intake, Offer, pack_text
from petalsd.swarm.inbound_budget import InboundBudget
from petalsd.swarm.serving import ServedModel
from petalsd.swarm.session_giver import Refusals, SessionGiver
from petalsd.swarm.sessions import Errand
from petalsd.swarm.stream import MessageStream
from tests.engine.rig import TinyModel, feed, opened, serving, states
from tests.swarm.conftest import GHOST, PEER_A, PEER_B
from tests.swarm.handing_over import RECORD
from tests.swarm.servers import PREFIX

OWN, TICKET = "QmOwn" + "o" * 41, "t" * 43
Conduct = Callable[[MessageStream], Awaitable[None]]


async def sound(stream: MessageStream) -> None:
    opening = await stream.receive(runtime_pb2.ExpertRequest)
    assert opening is not None
    intake = Intake(Offer.parse(opening, PREFIX), opening)
    await stream.send(runtime_pb2.ExpertResponse())
    while (message := await stream.receive(runtime_pb2.ExpertRequest)) is not None and message.tensors:
        intake.accept(message)
    assert message is not None
    intake.end(message)
    await stream.send(runtime_pb2.ExpertResponse(metadata=pack_text("ticket", TICKET)))
    await stream.receive(runtime_pb2.ExpertRequest)  # until the giver closes


async def answers_nonsense(stream: MessageStream) -> None:
    stream._frames.transport.write(b"\x07nonsense")
    await asyncio.Event().wait()


async def stops_reading(stream: MessageStream) -> None:
    await stream.receive(runtime_pb2.ExpertRequest)
    stream._frames.transport.pause_reading()
    await stream.send(runtime_pb2.ExpertResponse())
    await asyncio.Event().wait()


class Taker:
    """A stub of a server that behaves as ``conduct`` does."""

    def __init__(self, conduct: Conduct) -> None:
        self._conduct = conduct
        self._playing: asyncio.Task[None] | None = None

    async def open_hand_over(self) -> MessageStream:
        streams = []
        for end in socket.socketpair():
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            frames = take_over(*await asyncio.open_connection(sock=end), InboundBudget(2**22, 2**23))
            streams.append(MessageStream(PEER_A, frames, send_timeout_s=30.0))
        self._playing = asyncio.create_task(self._play(streams[1]))
        return streams[0]

    async def _play(self, stream: MessageStream) -> None:
        try:
            with suppress(PetalsdError):
                await self._conduct(stream)
        finally:
            stream.abort()

    async def stop(self) -> None:
        if self._playing is not None:
            self._playing.cancel()
            await asyncio.gather(self._playing, return_exceptions=True)


@pytest.fixture
async def session(tmp_path: Path) -> AsyncIterator[Session]:
    """With 400 KB of keys and values, of a client whose name can be told to others."""
    async with (
        serving(TinyModel(tmp_path), kv_tokens=512) as engine,
        opened(engine, max_tokens=512, peer=GHOST) as session,
    ):
        await feed(session, states(1, 400), [400])
        yield session


@pytest.mark.parametrize("conduct", [answers_nonsense, stops_reading])
async def test_the_next_taker_gets_what_a_hostile_one_does_not_take(
    session: Session, conduct: Conduct, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the time for all of it is over."""
    monkeypatch.setattr(session_giver, "_OFFER_S", 0.5)
    monkeypatch.setattr(
        session_giver, "takers", lambda view, *_: sorted(view.spans(), key=lambda one: one.peer)
    )
    stubs = {PEER_A: Taker(conduct), PEER_B: Taker(sound)}
    view = SwarmView(PREFIX, 4, [dict.fromkeys(stubs, RECORD)] * 4)
    model = ServedModel(PREFIX, 4, 64, session._core.served.pool.dtype, "test")
    refusals = Refusals()
    giver = SessionGiver(view, OWN, stubs.__getitem__, model, 20.0, refusals)  # type: ignore[arg-type]
    errands: list[asyncio.Task[None]] = []

    def send_on(errand: Errand) -> None:
        errands.append(asyncio.create_task(errand(session)))  # type: ignore[arg-type]

    async with asyncio.timeout(10):
        assert await giver.move(session, send_on)
    with pytest.raises(SessionMoved):
        await errands[-1]
    assert PEER_A in refusals and PEER_B not in refusals
    for stub in stubs.values():
        await stub.stop()


async def test_takers_that_refuse_always_do_not_keep_a_session_from_another(session: Session) -> None:
    """Three announce room and take nothing; the next time the one is asked that announces none."""
    liars = {f"QmLiar{number}" + "l" * 38: Taker(answers_nonsense) for number in range(3)}
    stubs = {**liars, PEER_B: Taker(sound)}
    records = dict.fromkeys(liars, replace(RECORD, version="petalsd 1", cache_tokens_left=10**9))
    records[PEER_B] = replace(RECORD, version="petalsd 1", cache_tokens_left=0)
    view = SwarmView(PREFIX, 4, [records] * 4)
    model, refusals = ServedModel(PREFIX, 4, 64, session._core.served.pool.dtype, "test"), Refusals()
    errands: list[asyncio.Task[None]] = []

    def send_on(errand: Errand) -> None:
        errands.append(asyncio.create_task(errand(session)))  # type: ignore[arg-type]

    moved = []
    async with asyncio.timeout(10):
        for _ in range(2):  # each time a drain asks anew
            giver = SessionGiver(view, OWN, stubs.__getitem__, model, 20.0, refusals)  # type: ignore[arg-type]
            moved.append(await giver.move(session, send_on))
    assert moved == [False, True]
    with pytest.raises(SessionMoved):
        await errands[-1]
    for stub in stubs.values():
        await stub.stop()
