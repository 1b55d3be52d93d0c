"""Servers that take long: waited for while they answer pings, replaced when they do not."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import structlog

from petalsd.client import span_session
from petalsd.client.silence import MISSES, while_heard
from petalsd.errors import RemoteFailure
from tests.client.fake_swarm import FakeServer, FakeSwarm, make_span, run_blocks
from tests.client.test_passes import make_passes
from tests.client.test_session import BLOCKS, QUICK, assert_same, make_session, random_states, run_steps
from tests.waiting import eventually

IMPATIENT = replace(QUICK, silence_s=0.01)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_session, "_SOON_S", 0.01)


def hanging(answers_pings: bool, at: int = 2) -> FakeServer:
    return FakeServer(make_span("a", 0, 6), hangs_at=at, answers_pings=answers_pings)


async def test_a_session_leaves_a_server_that_is_silent() -> None:
    """Long before the deadline of the answer."""
    first, second = hanging(False), FakeServer(make_span("b", 0, 6))
    hidden = random_states(2, 5)
    async with make_session(FakeSwarm(first, second), options=IMPATIENT) as session, asyncio.timeout(30):
        output = await run_steps(session, hidden, (3, 1, 1))
        assert [hop.peer for hop in session.route] == ["b"]
    assert first.pings == MISSES
    assert_same(output, run_blocks(BLOCKS, hidden))


async def test_a_session_waits_for_a_server_that_answers_pings() -> None:
    """As long as it takes: nothing is sent again."""
    server = hanging(True)
    hidden = random_states(2, 5)
    async with make_session(FakeSwarm(server), options=IMPATIENT) as session, asyncio.timeout(30):
        steps = asyncio.create_task(run_steps(session, hidden, (3, 1, 1)))
        await eventually(lambda: server.pings >= 2 * MISSES, 10, 0.01)
        server.revived.set()
        output = await steps
    assert len(server.messages) == 3
    assert_same(output, run_blocks(BLOCKS, hidden))


@pytest.mark.parametrize("answers_pings", [True, False])
async def test_a_session_says_what_it_waits_for(answers_pings: bool) -> None:
    """When an answer is late, whatever comes of it."""
    first, second = hanging(answers_pings), FakeServer(make_span("b", 0, 6))
    hidden = random_states(2, 5)
    with structlog.testing.capture_logs() as told:
        async with make_session(FakeSwarm(first, second), options=IMPATIENT) as session, asyncio.timeout(30):
            steps = asyncio.create_task(run_steps(session, hidden, (3, 1, 1)))
            await eventually(lambda: first.pings >= MISSES, 10, 0.01)
            first.revived.set()
            await steps
    late = {"peer": "a", "blocks": "0:6", "waited_s": 0.02}
    assert {"event": "answer_late", "log_level": "warning", **late} in told


async def test_the_deadline_of_an_answer_holds_all_the_same() -> None:
    """A server that answers pings and nothing else is left, too."""
    first, second = hanging(True), FakeServer(make_span("b", 0, 6))
    options = replace(IMPATIENT, request_timeout_s=0.1)
    hidden = random_states(1, 4)
    async with make_session(FakeSwarm(first, second), options=options) as session, asyncio.timeout(30):
        output = await run_steps(session, hidden, (3, 1))
        assert [hop.peer for hop in session.route] == ["b"]
    assert_same(output, run_blocks(BLOCKS, hidden))


async def test_a_pass_leaves_a_server_that_is_silent() -> None:
    """And goes through another one."""
    first, second = hanging(False, at=1), FakeServer(make_span("b", 0, 6))
    hidden = random_states(2, 4)
    passes = make_passes(FakeSwarm(first, second), options=IMPATIENT)
    async with asyncio.timeout(30):
        trace = await passes.forward(hidden)
    assert_same(trace.output, run_blocks(BLOCKS, hidden))
    assert second.passes == ["forward"]


async def test_misses_count_in_a_row() -> None:
    """A ping that is answered makes up for those before it. Of all the waiting is told once."""
    told: list[str] = []

    class Fickle(FakeServer):
        async def is_silent(self, timeout_s: float) -> bool:
            self.pings += 1
            if self.pings == 6:
                answer.set_result("late")
            return self.pings % 2 == 1

    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(30):
        server = Fickle(make_span("a", 0, 6))
        assert await while_heard(answer, server, IMPATIENT, lambda: told.append("late")) == "late"
    assert told == ["late"]


async def test_an_answer_is_not_kept_waiting_by_a_ping() -> None:
    """It comes while a ping is under way that nobody answers."""

    class Deaf(FakeServer):
        async def is_silent(self, timeout_s: float) -> bool:
            answer.set_result("late")
            await asyncio.Event().wait()
            raise AssertionError

    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(30):
        assert await while_heard(answer, Deaf(make_span("a", 0, 6)), IMPATIENT) == "late"


async def test_whoever_gives_up_leaves_nothing_behind() -> None:
    """What was waited for is cancelled, by silence as by the caller."""
    for is_cancelled in (False, True):
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(while_heard(answer, hanging(False), IMPATIENT))
        await asyncio.sleep(0)
        if is_cancelled:
            waiting.cancel()
        with pytest.raises(asyncio.CancelledError if is_cancelled else RemoteFailure):
            await waiting
        assert answer.cancelled()
