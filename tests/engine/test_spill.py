"""More sessions than the memory holds: they take turns in it, and nobody notices but the clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import torch

from petalsd.engine.engine import Engine
from petalsd.engine.handle import Session
from petalsd.engine.kv_transfer import Place
from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import Step
from petalsd.errors import EngineError, OutOfPages, SessionClosed, SpillError
from petalsd.kvcache.spill import Spill, SpillArea
from petalsd.types import BlockSpan
from tests.engine.rig import Gate, TinyModel, feed, opened, serving, states, with_hook
from tests.numeric import assert_close

KV_TOKENS = 64  # in memory, of which a session below takes almost half
NUM_SESSIONS = 8
TOKENS = 26


@pytest.fixture
def area(tmp_path: Path) -> SpillArea:
    """Room for 16 times the memory."""
    return SpillArea(tmp_path, max_bytes=64 << 20, keep_free_bytes=0)


@asynccontextmanager
async def crowd(engine: Engine, count: int = NUM_SESSIONS) -> AsyncIterator[list[Session]]:
    """Sessions of different peers that may each take the whole memory."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(opened(engine, max_tokens=KV_TOKENS, peer=f"peer {number}"))
            for number in range(count)
        ]


def inputs(count: int = NUM_SESSIONS) -> list[torch.Tensor]:
    return [states(1, TOKENS, seed) for seed in range(count)]


async def undisturbed(llama: TinyModel, hidden: torch.Tensor) -> torch.Tensor:
    """The answers that a session gets alone, step by step as in ``in_turns``."""
    async with serving(llama, kv_tokens=KV_TOKENS) as engine, opened(engine, max_tokens=KV_TOKENS) as session:
        return await feed(session, hidden, [TOKENS - 6, *[1] * 6])


async def in_turns(sessions: list[Session], hidden: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each session's prefill, then six rounds of one token for each, one session at a time."""
    parts = [[await s.step(Step(h[:, :-6], 0))] for s, h in zip(sessions, hidden, strict=True)]
    for position in range(TOKENS - 6, TOKENS):
        for session, states_of_one, answers in zip(sessions, hidden, parts, strict=True):
            answers.append(await session.step(Step(states_of_one[:, position : position + 1], position)))
    return [torch.cat(answers, dim=1) for answers in parts]


async def test_sessions_in_turns_get_exactly_their_own_answers(llama: TinyModel, area: SpillArea) -> None:
    """Eight sessions where two fit: pages go to the disk and come back at every step, bit for bit."""
    hidden = inputs()
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine, crowd(engine) as sessions:
        answers = await in_turns(sessions, hidden)
        stats = engine.pool.stats()
    assert stats.pages_spilled > stats.pages_total
    assert stats.pages_restored > 10 * stats.pages_total
    for states_of_one, actual in zip(hidden, answers, strict=True):
        assert torch.equal(actual, await undisturbed(llama, states_of_one))


async def test_a_batch_that_does_not_fit_runs_in_parts(llama: TinyModel, area: SpillArea, gate: Gate) -> None:
    """Steps that come together are all answered, though the memory holds two of their sessions at a time."""
    hidden = inputs()
    async with (
        serving(llama, blocks=with_hook(llama, 3, gate), kv_tokens=KV_TOKENS, spill=area) as engine,
        crowd(engine) as sessions,
    ):
        async with opened(engine, BlockSpan(3, 4), max_tokens=1) as holder:
            held = asyncio.create_task(holder.step(Step(states(1, 1), 0)))
            await gate.wait_until_reached()
            steps = [asyncio.create_task(s.step(Step(h, 0))) for s, h in zip(sessions, hidden, strict=True)]
            await asyncio.sleep(0)  # each hands its step in
            gate.opened.set()
            answers = await asyncio.gather(*steps)
            await held
        assert engine.stats().iterations_total >= 1 + NUM_SESSIONS // 2
        following = await asyncio.gather(*(s.step(Step(states(1, 1, 99), TOKENS)) for s in sessions))
    for states_of_one, actual, after in zip(hidden, answers, following, strict=True):
        expected = llama.expected(torch.cat((states_of_one, states(1, 1, 99)), dim=1)).detach()
        together = torch.cat((actual, after), dim=1)
        assert_close(together, expected, atol=1e-4, rtol=1e-4, what="answers of one of many")


async def test_long_prefills_of_many_share_the_memory(llama: TinyModel, area: SpillArea) -> None:
    """Prefills in many chunks go on at once, each longer than half of the memory, and all come to their end."""
    limits = EngineLimits(max_batch_tokens=16, prefill_chunk_tokens=8)
    hidden = [states(1, 40, seed) for seed in range(5)]
    async with (
        serving(llama, limits, kv_tokens=KV_TOKENS, spill=area) as engine,
        crowd(engine, 5) as sessions,
    ):
        answers = await asyncio.gather(
            *(s.step(Step(h, 0)) for s, h in zip(sessions, hidden, strict=True)),
        )
        assert engine.pool.stats().pages_restored > 0
    for states_of_one, actual in zip(hidden, answers, strict=True):
        assert_close(
            actual, llama.expected(states_of_one).detach(), atol=1e-4, rtol=1e-4, what="chunked prefill"
        )


async def test_beams_survive_the_disk(llama: TinyModel, area: SpillArea) -> None:
    """Rows that share runs are stored once and share them after their return; they diverge as before."""
    hidden, memory = states(3, 22), 2 * KV_TOKENS
    async with (
        serving(llama, kv_tokens=memory, spill=area) as engine,
        opened(engine, batch=3, max_tokens=32) as beams,
        opened(engine, max_tokens=memory) as other,
    ):
        await beams.step(Step(hidden[:, :17], 0))
        await beams.step(Step(hidden[:, 17:20], 17, hypo_ids=(2, 2, 0)))
        shared = engine.pool.stats().pages_shared
        await other.step(Step(states(1, memory, 5), 0))
        stats = engine.pool.stats()
        assert stats.pages_shared == shared > 0
        assert (stats.pages_free, stats.pages_spilled) == (0, stats.pages_evicted)
        actual = await beams.step(Step(hidden[:, 20:], 20, hypo_ids=(1, 1, 2)))
    history = torch.cat((hidden[[2, 2, 0], :17], hidden[:, 17:20]), dim=1)[[1, 1, 2]]
    expected = llama.expected(torch.cat((history, hidden[:, 20:]), dim=1)).detach()[:, 20:]
    assert_close(actual, expected, atol=1e-4, rtol=1e-4, what="beams")


async def test_rollback_of_pages_on_the_disk(llama: TinyModel, area: SpillArea) -> None:
    """A step that starts earlier drops tokens wherever they are, and continues from what is left."""
    hidden, other = states(1, TOKENS), states(1, 9, seed=3)
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine, crowd(engine, 3) as sessions:
        first, *rest = sessions
        await first.step(Step(hidden, 0))
        for session in rest:
            await session.step(Step(states(1, KV_TOKENS), 0))
        actual = await first.step(Step(other, 11))
    expected = llama.expected(torch.cat((hidden[:, :11], other), dim=1)).detach()[:, 11:]
    assert_close(actual, expected, atol=1e-4, rtol=1e-4, what="after the rollback")


async def test_closing_frees_what_lies_on_the_disk(llama: TinyModel, area: SpillArea, gate: Gate) -> None:
    """Sessions are closed and cancelled while their pages are away and while their step waits for memory."""
    async with (
        serving(llama, blocks=with_hook(llama, 3, gate), kv_tokens=KV_TOKENS, spill=area) as engine,
        crowd(engine) as sessions,
    ):
        steps = [asyncio.create_task(s.step(Step(h, 0))) for s, h in zip(sessions, inputs(), strict=True)]
        await gate.wait_until_reached()
        steps[-1].cancel()
        closing = [asyncio.create_task(session.close()) for session in sessions[2:6]]
        await asyncio.sleep(0)
        gate.opened.set()
        outcomes = await asyncio.gather(*steps, return_exceptions=True)
        await asyncio.gather(*closing)
        assert isinstance(outcomes[-1], asyncio.CancelledError)
        assert all(isinstance(outcome, SessionClosed) for outcome in outcomes[2:6])
        answered = [0, 1, 6]
        for index in answered:
            assert isinstance(outcomes[index], torch.Tensor)
        engine.pool.check_integrity()
        assert engine.pool.stats().pages_reserved == len(answered) * engine.pool.stats().pages_total


async def test_a_session_larger_than_the_memory_is_refused(llama: TinyModel, area: SpillArea) -> None:
    """The disk does not make room for a single session that could never run."""
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine:
        with pytest.raises(OutOfPages, match="more than all 16 pages in memory"):
            async with opened(engine, max_tokens=KV_TOKENS + 1):
                pass


async def test_a_session_that_moves_in_block_after_block_keeps_all_of_it(
    llama: TinyModel, area: SpillArea
) -> None:
    """Between two chunks its pages go to the disk and come back: what a chunk writes then must go there anew."""
    hidden, span = inputs(1)[0], BlockSpan(0, 4)
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine, crowd(engine, 3) as sessions:
        giver, taker, greedy = sessions
        await giver.step(Step(hidden[:, :-1], 0))
        for block in span:
            place = Place(BlockSpan(block, block + 1), 0, TOKENS - 1)
            await taker.write_kv(place, await giver.read_kv(place))
            await greedy.step(Step(states(1, KV_TOKENS), 0))
        taker.resume_at(TOKENS - 1)
        actual = await taker.step(Step(hidden[:, -1:], TOKENS - 1))
    expected = llama.expected(hidden).detach()[:, -1:]
    assert_close(actual, expected, atol=1e-4, rtol=1e-4, what="a session that moved in")


class FailingDisk:
    """Makes ``write`` or ``read`` of the engine's pool fail as a disk does, until it is repaired."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
        self.is_broken = False
        working = getattr(Spill, operation)

        def operate(spill: Spill, transfers: bytearray) -> None:
            if self.is_broken:
                raise SpillError(f"{operation} failed: Input/output error")
            working(spill, transfers)

        monkeypatch.setattr(Spill, operation, operate)


async def test_a_disk_that_cannot_be_read_costs_the_sessions_on_it(
    llama: TinyModel, area: SpillArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session whose pages cannot be read gets SpillError and is over; those in memory go on."""
    disk, hidden = FailingDisk(monkeypatch, "read"), inputs(3)
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine, crowd(engine, 3) as sessions:
        for session, states_of_one in zip(sessions, hidden, strict=True):
            await session.step(Step(states_of_one[:, :-1], 0))
        disk.is_broken = True
        with pytest.raises(SpillError, match="spill_error: read failed"):
            await sessions[0].step(Step(hidden[0][:, -1:], TOKENS - 1))
        with pytest.raises(SessionClosed):
            await sessions[0].step(Step(hidden[0][:, -1:], TOKENS - 1))
        actual = await sessions[2].step(Step(hidden[2][:, -1:], TOKENS - 1))
        disk.is_broken = False
        assert (await sessions[1].step(Step(hidden[1][:, -1:], TOKENS - 1))).shape[1] == 1
    expected = llama.expected(hidden[2]).detach()[:, -1:]
    assert_close(actual, expected, atol=1e-4, rtol=1e-4, what="a session in memory")


async def test_a_disk_that_cannot_be_written_costs_who_needs_it(
    llama: TinyModel, area: SpillArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session that needs room gets SpillError; those in memory keep it; nothing more is promised meanwhile."""
    disk, hidden = FailingDisk(monkeypatch, "write"), inputs(4)
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine, crowd(engine, 4) as sessions:
        for session, states_of_one in zip(sessions[:2], hidden, strict=False):
            await session.step(Step(states_of_one[:, :-1], 0))
        disk.is_broken = True
        with pytest.raises(SpillError):
            await sessions[2].step(Step(hidden[2], 0))
        with pytest.raises(OutOfPages):
            await engine.open_session(sessions[0].spec)
        for session, states_of_one in zip(sessions[:2], hidden, strict=False):
            actual = await session.step(Step(states_of_one[:, -1:], TOKENS - 1))
            expected = llama.expected(states_of_one).detach()[:, -1:]
            assert_close(actual, expected, atol=1e-4, rtol=1e-4, what="a session in memory")
        disk.is_broken = False
        await sessions[3].step(Step(hidden[3], 0))
        assert engine.pool.stats().pages_spilled > 0
        await (await engine.open_session(sessions[0].spec)).close()


async def test_a_disk_that_failed_once_is_tried_again_when_everybody_has_left(
    llama: TinyModel, area: SpillArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as no more is promised than the memory holds nothing is written, so nobody would find out."""
    disk = FailingDisk(monkeypatch, "write")
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine:
        async with crowd(engine, 3) as sessions:
            disk.is_broken = True
            await sessions[0].step(Step(states(1, KV_TOKENS), 0))
            with pytest.raises(SpillError):
                await sessions[1].step(Step(states(1, KV_TOKENS), 0))
            with pytest.raises(OutOfPages):
                await engine.open_session(sessions[0].spec)
            disk.is_broken = False
        async with crowd(engine, 3) as sessions:
            for session in sessions:
                await session.step(Step(states(1, KV_TOKENS), 0))
            assert engine.pool.stats().pages_spilled > 0


async def test_a_session_that_could_not_be_read_for_its_hand_over_computes_no_more(
    llama: TinyModel, area: SpillArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its pages hold is anybody's guess: a step on them would be answered with wrong states."""
    disk, hidden = FailingDisk(monkeypatch, "read"), inputs(3)
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine, crowd(engine, 3) as sessions:
        for session, states_of_one in zip(sessions, hidden, strict=True):
            await session.step(Step(states_of_one[:, :-1], 0))
        disk.is_broken = True
        with pytest.raises(SpillError, match="read failed"):
            await sessions[0].read_kv(Place(BlockSpan(0, 4), 0, TOKENS - 1))
        disk.is_broken = False
        with pytest.raises(SessionClosed, match="read failed"):
            await sessions[0].step(Step(hidden[0][:, -1:], TOKENS - 1))
        assert (await sessions[2].step(Step(hidden[2][:, -1:], TOKENS - 1))).shape[1] == 1


async def test_a_step_beside_a_hand_over_that_could_not_be_read_fails_with_it(
    llama: TinyModel, area: SpillArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it came before anybody could know."""
    disk, hidden = FailingDisk(monkeypatch, "read"), inputs(3)
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine, crowd(engine, 3) as sessions:
        for session, states_of_one in zip(sessions, hidden, strict=True):
            await session.step(Step(states_of_one[:, :-1], 0))
        disk.is_broken = True
        outcomes = await asyncio.gather(
            sessions[0].read_kv(Place(BlockSpan(0, 4), 0, TOKENS - 1)),
            sessions[0].step(Step(hidden[0][:, -1:], TOKENS - 1)),
            return_exceptions=True,
        )
        disk.is_broken = False
        assert all(isinstance(outcome, SpillError) for outcome in outcomes), outcomes


async def test_a_transfer_that_fails_on_the_way_leaves_nobody_with_wrong_states(
    llama: TinyModel, area: SpillArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages whose way back was cut short by another error than the disk's hold what was there before."""
    hidden, is_broken, working = inputs(3), False, Spill.read

    def read(spill: Spill, transfers: bytearray) -> None:
        if is_broken:
            raise RuntimeError("not enough memory")
        working(spill, transfers)

    monkeypatch.setattr(Spill, "read", read)
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine, crowd(engine, 3) as sessions:
        for session, states_of_one in zip(sessions, hidden, strict=True):
            await session.step(Step(states_of_one[:, :-1], 0))
        is_broken = True
        with pytest.raises(EngineError, match="moving keys and values failed"):
            await sessions[0].read_kv(Place(BlockSpan(0, 4), 0, TOKENS - 1))
        is_broken = False
        with pytest.raises((EngineError, SessionClosed)):
            await sessions[0].step(Step(hidden[0][:, -1:], TOKENS - 1))
        async with opened(engine) as another:
            await another.step(Step(states(1, 4), 0))


async def test_a_chunk_that_cannot_be_copied_costs_nobody_a_session(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages are as they were; also its own session goes on."""
    hidden = inputs(1)[0]
    async with serving(llama) as engine, opened(engine) as session:
        await session.step(Step(hidden[:, :-1], 0))

        def gather(*_: object) -> None:
            raise RuntimeError("not enough memory")

        with monkeypatch.context() as broken:
            broken.setattr(type(engine.pool.kv), "gather", gather)
            with pytest.raises(EngineError, match="moving keys and values failed: RuntimeError"):
                await session.read_kv(Place(BlockSpan(0, 4), 0, TOKENS - 1))
        actual = await session.step(Step(hidden[:, -1:], TOKENS - 1))
    expected = llama.expected(hidden).detach()[:, -1:]
    assert_close(actual, expected, atol=1e-4, rtol=1e-4, what="a session that could not be read")
