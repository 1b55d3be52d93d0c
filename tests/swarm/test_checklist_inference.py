"""The interop checklist (protocol.md 10, server) for ``rpc_inference``, spoken by a stock client's stream."""

from __future__ import annotations

import uuid

import pytest
import torch
from hivemind.p2p import P2PHandlerError

from petalsd.swarm.node import Node
from tests.engine.rig import PAGE_TOKENS, states
from tests.numeric import assert_close
from tests.swarm.servers import PREFIX, Server
from tests.swarm.stock import DUMMY, DUMMY_INT64, TIMEOUT_S, StockSession
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


async def refused(session: StockSession, match: str) -> None:
    """The session's next answer is an error with this text, at once and not after a client's timeout."""
    with pytest.raises(P2PHandlerError, match=match):
        await session.answer()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
async def test_row_8_a_session_takes_any_float_dtype(tiny: Server, client: Node, dtype: torch.dtype) -> None:
    """Row 8: prefill and decode in any float dtype give transformers' states in the server's dtype."""
    hidden = states(2, 6).to(dtype)
    session = await tiny.stock_session(client)
    answers = [await session.step(tiny.uid, hidden[:, :4], max_length=6)]
    answers += [await session.step("", hidden[:, at : at + 1]) for at in (4, 5)]
    assert {answer.dtype for answer in answers} == {torch.float32}
    expected = tiny.model.expected(hidden.float()).detach()
    assert_close(torch.cat(answers, dim=1), expected, **TOLERANCE, what=str(dtype))
    assert await session.end()


@pytest.mark.parametrize("max_length", [None, 4.0, "4", True, -1, 10**9])
async def test_row_9_the_first_message_must_carry_a_max_length(
    tiny: Server, client: Node, max_length: object
) -> None:
    """Row 9: anything but an int within the limits is refused by name."""
    session = await tiny.stock_session(client)
    session.put(tiny.uid, [states(1, 2), DUMMY, DUMMY_INT64], {"max_length": max_length})
    await refused(session, "bad_request: max_length")


async def test_row_9_later_messages_need_no_max_length_and_may_always_give_a_start(
    tiny: Server, client: Node
) -> None:
    """Row 9: start_from_position equal to the position is a no-op, a smaller one rolls back."""
    hidden = states(1, 5)
    session = await tiny.stock_session(client)
    first = await session.step(tiny.uid, hidden[:, :3], max_length=5, start_from_position=0)
    await session.step("", states(1, 2, seed=9), start_from_position=3)
    again = await session.step("", hidden[:, 3:], start_from_position=3)
    expected = tiny.model.expected(hidden).detach()
    assert_close(torch.cat([first, again], dim=1), expected, **TOLERANCE, what="rolled back")
    assert await session.end()


@pytest.mark.parametrize("start", [-1, 3, 10**12, None, 1.0, "0", True])
async def test_row_9_a_start_outside_the_session_is_refused(
    tiny: Server, client: Node, start: object
) -> None:
    """Row 9: stock servers accept gaps and crash on negatives; we name the field."""
    session = await tiny.stock_session(client)
    await session.step(tiny.uid, states(1, 2), max_length=8)
    session.put("", [states(1, 1), DUMMY, DUMMY_INT64], {"start_from_position": start})
    await refused(session, "bad_request: start_from_position")


async def test_row_10_a_repeated_step_id_gets_no_answer(tiny: Server, client: Node) -> None:
    """Row 10: one answer per accepted step; a step id seen before is skipped and changes nothing."""
    hidden = states(1, 3)
    session = await tiny.stock_session(client)
    first = await session.step(tiny.uid, hidden[:, :2], max_length=8, step_id="one")
    session.put("", [states(1, 2, seed=7), DUMMY, DUMMY_INT64], {"step_id": "one"})
    second = await session.step("", hidden[:, 2:], step_id="two")
    expected = tiny.model.expected(hidden).detach()
    assert_close(torch.cat([first, second], dim=1), expected, **TOLERANCE, what="answers")
    assert await session.end()


async def test_row_11_the_batch_of_the_first_message_holds(tiny: Server, client: Node) -> None:
    """Row 11: another batch size later is refused."""
    session = await tiny.stock_session(client)
    await session.step(tiny.uid, states(2, 2), max_length=8)
    session.put("", [states(3, 1), DUMMY, DUMMY_INT64], {})
    await refused(session, "bad_request: hidden states")


async def test_row_11_zero_token_steps_are_echoed(tiny: Server, client: Node) -> None:
    """Row 11: a step of no tokens computes nothing, at any time, and answers its own shape."""
    hidden = states(2, 2)
    session = await tiny.stock_session(client)
    assert (await session.step(tiny.uid, hidden[:, :0], max_length=4)).shape == (2, 0, 64)
    answer = await session.step("", hidden)
    assert (await session.step("", hidden[:, :0])).shape == (2, 0, 64)
    assert_close(answer, tiny.model.expected(hidden).detach(), **TOLERANCE, what="after an empty step")
    assert await session.end()


async def test_row_11_hypo_ids_reorder_the_rows(tiny: Server, client: Node) -> None:
    """Row 11: row j goes on from old row hypo_ids[j]."""
    hidden = states(2, 4)
    session = await tiny.stock_session(client)
    await session.step(tiny.uid, hidden[:, :3], max_length=8)
    answer = await session.step("", hidden[:, 3:], hypo_ids=torch.tensor([1, 1]))
    swapped = torch.cat([hidden[[1, 1], :3], hidden[:, 3:]], dim=1)
    assert_close(answer, tiny.model.expected(swapped).detach()[:, 3:], **TOLERANCE, what="beams")
    assert await session.end()


@pytest.mark.parametrize(
    "hypo_ids",
    [
        torch.tensor([0, 2]),
        torch.tensor([-1, 0]),
        torch.tensor([0]),
        torch.zeros(2),
        torch.zeros(0),
        torch.zeros(2, 1, dtype=torch.int64),
    ],
)
async def test_row_11_bad_hypo_ids_are_refused(tiny: Server, client: Node, hypo_ids: torch.Tensor) -> None:
    """Row 11: int64 always, one per row, each naming a row."""
    session = await tiny.stock_session(client)
    session.put(tiny.uid, [states(2, 1), DUMMY, hypo_ids], {"max_length": 4})
    await refused(session, "bad_request: hypo_ids")


async def test_row_12_a_failed_step_is_answered_with_an_error(tiny: Server, client: Node) -> None:
    """Row 12: a stream is never closed without a word while a step is outstanding."""
    session = await tiny.stock_session(client)
    await session.step(tiny.uid, states(1, 3), max_length=4)
    session.put("", [states(1, 2), DUMMY, DUMMY_INT64], {})
    await refused(session, "bad_request: max_length")


async def test_row_12_the_empty_message_ends_a_session_without_an_error(tiny: Server, client: Node) -> None:
    """Row 12: after it the stream just ends, also when nothing else was ever sent."""
    session = await tiny.stock_session(client)
    assert await session.end()


async def test_row_14_a_full_cache_refuses_at_once_unless_told_to_wait(tiny: Server, client: Node) -> None:
    """Row 14: without alloc_timeout the refusal is immediate; with it the session waits for room."""
    first = await tiny.stock_session(client)
    await first.step(tiny.uid, states(1, 1), max_length=500)
    second = await tiny.stock_session(client)
    second.put(tiny.uid, [states(1, 1), DUMMY, DUMMY_INT64], {"max_length": 400})
    await refused(second, "out_of_pages")
    third = await tiny.stock_session(client)
    third.put(tiny.uid, [states(1, 1), DUMMY, DUMMY_INT64], {"max_length": 400, "alloc_timeout": 1e9})
    await eventually(lambda: tiny.pool.stats().waiters, TIMEOUT_S, interval_s=0.01)
    assert await first.end()
    assert (await third.answer()).shape == (1, 1, 64)
    assert await third.end()


@pytest.mark.parametrize("alloc_timeout", [None, -1, "5", float("nan")])
async def test_row_14_a_bad_alloc_timeout_is_refused(
    tiny: Server, client: Node, alloc_timeout: object
) -> None:
    """Row 14: seconds, and nothing else."""
    session = await tiny.stock_session(client)
    metadata = {"max_length": 4, "alloc_timeout": alloc_timeout}
    session.put(tiny.uid, [states(1, 1), DUMMY, DUMMY_INT64], metadata)
    await refused(session, "bad_request: alloc_timeout")


async def test_row_15_draining_refuses_new_sessions_and_finishes_open_ones(
    tiny: Server, client: Node
) -> None:
    """Row 15: sessions are irreplaceable for stock clients, so a server that leaves lets them end."""
    hidden = states(1, 3)
    session = await tiny.stock_session(client)
    first = await session.step(tiny.uid, hidden[:, :2], max_length=8)
    tiny.serving.refuse("moving to other blocks")
    try:
        late = await tiny.stock_session(client)
        late.put(tiny.uid, [hidden, DUMMY, DUMMY_INT64], {"max_length": 8})
        await refused(late, "draining: moving to other blocks")
        second = await session.step("", hidden[:, 2:])
    finally:
        tiny.serving.serve()
    expected = tiny.model.expected(hidden).detach()
    assert_close(torch.cat([first, second], dim=1), expected, **TOLERANCE, what="a session through a drain")
    assert await session.end()


async def test_a_session_may_use_a_sub_range(tiny: Server, client: Node) -> None:
    """A session is charged for the blocks it names, and runs only these."""
    session = await tiny.stock_session(client)
    uid = f"{PREFIX}.1 {PREFIX}.2"
    await session.step(uid, states(1, 2), max_length=64)
    assert tiny.pool.stats().pages_reserved == 2 * 64 // PAGE_TOKENS
    assert await session.end()


async def test_a_session_id_is_unique_at_the_server(tiny: Server, client: Node) -> None:
    """A second session with an id in use is refused, and the first does not notice."""
    name = str(uuid.uuid4())
    first = await tiny.stock_session(client)
    await first.step(tiny.uid, states(1, 1), max_length=8, session_id=name)
    second = await tiny.stock_session(client)
    second.put(tiny.uid, [states(1, 1), DUMMY, DUMMY_INT64], {"max_length": 8, "session_id": name})
    await refused(second, "bad_request: session_id")
    assert (await first.step("", states(1, 1))).shape == (1, 1, 64)
    assert await first.end()
    third = await tiny.stock_session(client)
    await third.step(tiny.uid, states(1, 1), max_length=8, session_id=name)
    assert await third.end()


async def test_a_client_that_closes_in_mid_stream_frees_its_pages(tiny: Server, client: Node) -> None:
    """Closing without the empty message gives the pages back within a second (the fixture waits no longer)."""
    stream = await tiny.stub(client).open_inference()
    await stream.send(tiny.uid, [states(1, 2), DUMMY, DUMMY_INT64], {"max_length": 64})
    assert len(await stream.receive(TIMEOUT_S)) == 1
    assert tiny.pool.stats().sessions == 1
    stream.abort()
