"""Sessions that go from one server to another, over real libp2p: exact where it works, as before where not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch

from petalsd.client.session import InferenceSession
from petalsd.engine import kv_transfer
from petalsd.engine.step import SessionSpec
from petalsd.types import BlockSpan
from tests.engine.rig import states
from tests.numeric import assert_close
from tests.swarm.conftest import GHOST
from tests.swarm.handing_over import SPAN, Swarm
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module")
async def swarm(both: Swarm) -> AsyncIterator[Swarm]:
    """After each test both servers have all their pages back."""
    yield both
    await both.idle()


async def feed(session: InferenceSession, hidden: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return torch.cat([await session.step(part) for part in hidden.split(sizes, dim=1)], dim=1)


async def test_a_client_goes_on_where_its_session_went(swarm: Swarm) -> None:
    """Rows in another order, prompts, a rollback: the numbers are those of one server, and nothing is replayed."""
    hidden = states(2, 30)
    prompts = 0.1 * states(3, 4).view(3, 1, 4, -1)
    async with swarm.session() as session, swarm.session() as undisturbed:
        outputs = []
        for one in (session, undisturbed):
            parts = [
                await one.step(hidden[:, :18], prompts),
                await one.step(hidden[[1, 0], 18:20], None, (1, 0)),
            ]
            if one is session:
                assert await swarm.first.handler.hand_over(swarm.view(), None, 20.0) == 1
                before = swarm.second.engine.stats().tokens_total
            one.position = 19
            parts.append(await feed(one, hidden[[1, 0], 19:], [1, 1, 9]))
            outputs.append(torch.cat(parts, 1))
        assert [hop.peer for hop in session.route] == [swarm.second.node.peer_id]
        assert swarm.second.engine.stats().tokens_total - before == 2 * 11
        assert await swarm.first.handler.hand_over(swarm.view(GHOST), None, 20.0) == 0
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


async def test_sessions_go_between_two_steps(swarm: Swarm) -> None:
    """Under a client that never pauses, there and back; only sessions that use other blocks are asked."""
    hidden = states(1, 60)
    async with swarm.session() as session:
        await session.step(hidden[:, :5])
        decoding = asyncio.create_task(feed(session, hidden[:, 5:], [1] * 55))
        assert await swarm.first.handler.hand_over(swarm.view(), BlockSpan(0, 4), 20.0) == 0
        assert await swarm.first.handler.hand_over(swarm.view(), BlockSpan(2, 4), 20.0) == 1
        await eventually(lambda: bool(swarm.second.handler._calls))
        await eventually(lambda: all(call.movable for call in swarm.second.handler._calls))
        assert await swarm.second.handler.hand_over(swarm.view(), None, 20.0) == 1
        output = await decoding
        assert [hop.peer for hop in session.route] == [swarm.first.node.peer_id]
    assert_close(output, swarm.expected.expected(hidden, SPAN).detach()[:, 5:], 1e-4, 1e-4, "there and back")


async def test_steps_go_on_while_the_taker_makes_up_its_mind(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session stands still for the last tokens only, not for the whole of its hand-over."""
    hidden, may_answer = states(1, 12), asyncio.Event()

    async def check(peer: str, span: BlockSpan) -> None:
        await may_answer.wait()

    monkeypatch.setattr(swarm.second.handler._taker._givers, "check", check)
    async with swarm.session() as session:
        outputs = [await session.step(hidden[:, :5])]
        moving = asyncio.create_task(swarm.first.handler.hand_over(swarm.view(), None, 20.0))
        await eventually(lambda: swarm.second.handler.num_streams)
        outputs.append(await feed(session, hidden[:, 5:9], [1] * 4))
        may_answer.set()
        assert await moving == 1
        outputs.append(await feed(session, hidden[:, 9:], [1] * 3))
        assert [hop.peer for hop in session.route] == [swarm.second.node.peer_id]
    assert_close(torch.cat(outputs, 1), swarm.expected.expected(hidden, SPAN).detach(), 1e-4, 1e-4, "both")


async def test_what_changes_while_a_session_is_copied_is_copied_again(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token after token, under a client that rolls back, swaps its rows and never pauses."""
    monkeypatch.setattr(kv_transfer, "_CHUNK_BYTES", 2 * 2 * 16 * 4)
    hidden, fed_before = states(2, 48), swarm.second.engine.stats().tokens_total
    async with swarm.session() as session:
        await session.step(hidden[:, :40])
        moving = asyncio.create_task(swarm.first.handler.hand_over(swarm.view(), None, 20.0))
        num_steps = 0
        while not moving.done():
            await restless_step(session, hidden, num_steps)
            num_steps += 1
        assert await moving == 1
        moved = await session.step(hidden[:, session.position :])
        fed = swarm.second.engine.stats().tokens_total - fed_before
        assert [hop.peer for hop in session.route] == [swarm.second.node.peer_id]
    async with swarm.session() as undisturbed:
        await undisturbed.step(hidden[:, :40])
        for number in range(num_steps):
            await restless_step(undisturbed, hidden, number)
        stayed = await undisturbed.step(hidden[:, undisturbed.position :])
    torch.testing.assert_close(moved, stayed, atol=1e-5, rtol=1e-5)
    assert num_steps > 1 and fed <= 2 * (moved.shape[1] + 1)  # the last step of the loop may have gone there


async def restless_step(session: InferenceSession, hidden: torch.Tensor, number: int) -> None:
    """Every third one rolls back, and swaps the rows where none is longer than any other."""
    if number % 3 == 2:
        session.position -= 3
    rows = (1, 0) if number % 6 == 5 else None
    await session.step(hidden[:, session.position : session.position + 1], None, rows)


async def test_nobody_takes_it(swarm: Swarm) -> None:
    """A full server refuses, one that is gone does not answer: the session stays and goes on where it is."""
    hidden = states(1, 20)
    async with swarm.session(max_tokens=128) as session:
        outputs = [await session.step(hidden[:, :16])]
        full = await swarm.second.engine.open_session(SessionSpec(BlockSpan(0, 4), 1, 240, "somebody"))
        view = swarm.view(GHOST, swarm.second.node.peer_id)
        assert await swarm.first.handler.hand_over(view, None, 20.0) == 0
        outputs.append(await feed(session, hidden[:, 16:], [1, 3]))
        await full.close()
        assert [hop.peer for hop in session.route] == [swarm.first.node.peer_id]
    assert_close(torch.cat(outputs, 1), swarm.expected.expected(hidden, SPAN).detach(), 1e-4, 1e-4, "stays")


async def test_a_taker_that_lost_it_is_replaced_by_a_replay(swarm: Swarm) -> None:
    """The ticket leads nowhere: the client feeds its history, as after any failure."""
    hidden = states(1, 12)
    async with swarm.session() as session:
        outputs = [await session.step(hidden[:, :9])]
        assert await swarm.first.handler.hand_over(swarm.view(), None, 20.0) == 1
        swarm.second.handler._tickets.close("the test dropped it")
        outputs.append(await feed(session, hidden[:, 9:], [1, 2]))
    assert_close(torch.cat(outputs, 1), swarm.expected.expected(hidden, SPAN).detach(), 1e-4, 1e-4, "replay")


async def test_a_taker_that_drains_does_not_wait_for_clients(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that has not come for its session after a while replays it elsewhere."""
    monkeypatch.setattr(swarm.second.handler._tickets, "_grace_s", 0.0)
    hidden = states(1, 12)
    async with swarm.session() as session:
        outputs = [await session.step(hidden[:, :9])]
        assert await swarm.first.handler.hand_over(swarm.view(), None, 20.0) == 1
        assert swarm.second.engine.work_outside(None) == 1
        assert await swarm.second.handler.hand_over(swarm.view(GHOST), None, 20.0) == 0
        await eventually(lambda: swarm.second.engine.work_outside(None) == 0)
        outputs.append(await feed(session, hidden[:, 9:], [1, 2]))
    assert_close(torch.cat(outputs, 1), swarm.expected.expected(hidden, SPAN).detach(), 1e-4, 1e-4, "replay")


async def test_the_session_of_a_stock_client_stays(swarm: Swarm) -> None:
    """It could not follow, and has the time of a drain to finish."""
    stock = await swarm.first.stock_session(swarm.client)
    await stock.step(swarm.first.uid, states(1, 3), max_length=8)
    assert await swarm.first.handler.hand_over(swarm.view(), None, 20.0) == 0
    await stock.step("", states(1, 1))
    assert await stock.end()
