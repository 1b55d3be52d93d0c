"""Steps that wait for a session, and sessions by their id."""

from __future__ import annotations

import asyncio

import pytest

from petalsd.engine.handle import Session
from petalsd.errors import BadRequest, SessionClosed
from petalsd.swarm.requests import StepMessage
from petalsd.swarm.sessions import SessionRegistry, StepInbox
from petalsd.types import BlockSpan
from tests.swarm.conftest import PEER_A, PEER_B


def step(name: str) -> StepMessage:
    return StepMessage((), {}, "", name, None, ())


async def test_the_clients_step_goes_before_a_pushed_one() -> None:
    """When both wait, the client's is taken first."""
    inbox = StepInbox()
    inbox.push(step("pushed"), PEER_A)
    inbox.put(step("own"))
    assert [(await inbox.get()).step_id, (await inbox.get()).step_id] == ["own", "pushed"]


async def test_the_end_comes_after_the_clients_steps_and_before_pushed_ones() -> None:
    """What the client sent before the end is still handed out; pushes are not."""
    inbox = StepInbox()
    inbox.put(step("own"))
    inbox.push(step("pushed"), PEER_A)
    inbox.end()
    assert (await inbox.get()).step_id == "own"
    assert await inbox.get() is None
    assert not inbox.push(step("late"), PEER_A)


async def test_a_waiting_taker_is_woken() -> None:
    """A step that comes later ends the wait."""
    inbox = StepInbox()
    taker = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.put(step("own"))
    assert (await taker).step_id == "own"


async def test_a_client_that_sends_too_fast_waits() -> None:
    """Only a few steps are held; the next is taken from the wire when one was taken out."""
    inbox = StepInbox()
    for name in "ab":
        assert inbox.has_room
        inbox.put(step(name))
    assert not inbox.has_room
    await inbox.get()
    assert inbox.has_room
    inbox.put(step("c"))
    assert [(await inbox.get()).step_id for _ in range(2)] == ["b", "c"]
    inbox.end()
    assert not inbox.has_room


async def test_pushes_are_bounded_and_come_from_one_peer() -> None:
    """The first peer that pushes is the one that may; a few of its steps may wait."""
    inbox = StepInbox()
    assert inbox.push(step("0"), PEER_A)
    assert not inbox.push(step("x"), PEER_B)
    assert [inbox.push(step(str(number)), PEER_A) for number in range(1, 6)] == [
        True,
        True,
        True,
        False,
        False,
    ]


async def test_a_push_reaches_only_the_session_of_its_blocks() -> None:
    """Unknown ids and other blocks are turned away; a session that has ended is unknown."""
    registry, inbox = SessionRegistry(), StepInbox()
    with registry.claim("id", inbox):
        assert not registry.deliver("id", BlockSpan(0, 2), step("s"), PEER_A)
        inbox.span = BlockSpan(0, 2)
        assert not registry.deliver("id", BlockSpan(0, 1), step("s"), PEER_A)
        assert registry.deliver("id", BlockSpan(0, 2), step("s"), PEER_A)
    assert not registry.deliver("id", BlockSpan(0, 2), step("s"), PEER_A)
    assert len(registry) == 0


async def test_an_id_in_use_cannot_be_claimed() -> None:
    """The second claim names the field; sessions without an id do not collide."""
    registry = SessionRegistry()
    with (
        registry.claim("id", StepInbox()),
        registry.claim(None, StepInbox()),
        registry.claim(None, StepInbox()),
    ):
        with pytest.raises(BadRequest, match="session_id"), registry.claim("id", StepInbox()):
            pass
        assert len(registry) == 1


async def test_an_errand_goes_first_and_is_dropped_with_the_session() -> None:
    """Before a step that waits; one that waits when the session is over is told so, and one that comes later."""
    inbox, errands = StepInbox(), [Note(), Note(), Note()]
    inbox.put(step("own"))
    inbox.send_on(errands[0])
    assert await inbox.get() is errands[0]
    inbox.send_on(errands[1])
    inbox.close()
    inbox.send_on(errands[2])
    assert [errand.is_dropped for errand in errands] == [False, True, True]


class Note:
    """An errand that notes its end."""

    is_dropped = False

    async def __call__(self, session: Session) -> None: ...

    def drop(self) -> None:
        self.is_dropped = True


async def test_a_session_that_ended_here_wakes_whoever_waits() -> None:
    """Before anything that waits already: no step of it would be computed."""
    inbox = StepInbox()
    waiting = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.fail(SessionClosed("drained"))
    with pytest.raises(SessionClosed, match="drained"):
        await waiting
    inbox.put(step("late"))
    with pytest.raises(SessionClosed, match="drained"):
        await inbox.get()
