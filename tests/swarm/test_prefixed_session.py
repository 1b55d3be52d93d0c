"""Sessions that begin like earlier ones: what is computed, that it is right, and what happens when it fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from petalsd.engine import kv_transfer
from petalsd.engine.engine import Engine
from petalsd.engine.observer import BatchReport, NullObserver
from petalsd.engine.step import SessionSpec, Step
from petalsd.errors import EngineError, SessionClosed, SpillError
from petalsd.kvcache.prefixes import SEGMENT_TOKENS, PrefixCache
from petalsd.swarm import observer
from petalsd.swarm.prefixed_session import PrefixedSession
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel, serving, states
from tests.numeric import assert_close
from tests.swarm.servers import joining, node, server

PROMPT = 2 * SEGMENT_TOKENS + 10
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


class Computed(NullObserver):
    """Counts the tokens of prompts that the engine computed."""

    def __init__(self) -> None:
        self.tokens = 0

    def batch_done(self, report: BatchReport) -> None:
        self.tokens += report.prefill_tokens

    def take(self) -> int:
        tokens, self.tokens = self.tokens, 0
        return tokens


class Heard(observer.NullObserver):
    def __init__(self) -> None:
        self.prompts: list[tuple[int, int]] = []

    def prompt_began(self, tokens: int, num_reused: int) -> None:
        self.prompts.append((tokens, num_reused))


class Bench:
    """An engine over a tiny model, and a cache that sessions share."""

    def __init__(self, model: TinyModel, engine: Engine, computed: Computed, max_bytes: int) -> None:
        self.model = model
        self.engine = engine
        self.computed = computed
        self.cache = PrefixCache(max_bytes)
        self.heard = Heard()

    @contextlib.asynccontextmanager
    async def session(
        self, peer: str = "peer", batch: int = 1, span: BlockSpan | None = None, max_tokens: int = 400
    ) -> AsyncIterator[PrefixedSession]:
        spec = SessionSpec(span or self.model.span, batch, max_tokens, peer)
        opened = await self.engine.open_session(spec)
        prefixed = PrefixedSession(opened, self.cache, self.heard)
        try:
            yield prefixed
            await prefixed.finish()
        finally:
            prefixed.stop()
            await opened.close()

    async def answer(
        self, hidden: torch.Tensor, peer: str = "peer", span: BlockSpan | None = None
    ) -> torch.Tensor:
        """Of one session with this prompt; checked against transformers."""
        async with self.session(peer, hidden.shape[0], span) as session:
            output = await session.step(Step(hidden, 0))
        assert_close(output, self.model.expected(hidden, span).detach(), **TOLERANCE, what="answer")
        return output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("tiny"))


@contextlib.asynccontextmanager
async def bench_over(model: TinyModel, max_bytes: int = 1 << 24) -> AsyncIterator[Bench]:
    computed = Computed()
    async with serving(model, kv_tokens=8192, observer=computed) as engine:
        yield Bench(model, engine, computed, max_bytes)


@pytest.fixture
async def bench(model: TinyModel) -> AsyncIterator[Bench]:
    async with bench_over(model) as bench:
        yield bench


async def test_the_same_prompt_is_computed_once(bench: Bench) -> None:
    """But for what is no whole segment; the states are those of the first time, bit for bit."""
    hidden = states(1, PROMPT)
    first = await bench.answer(hidden)
    assert bench.computed.take() == PROMPT
    second = await bench.answer(hidden)
    assert bench.computed.take() == 10
    assert torch.equal(first[:, : PROMPT - 10], second[:, : PROMPT - 10])
    assert bench.heard.prompts == [(PROMPT, 0), (PROMPT, PROMPT - 10)]
    assert (bench.cache.tokens_seen, bench.cache.tokens_reused) == (2 * PROMPT, PROMPT - 10)


async def test_a_prompt_of_whole_segments_is_not_computed_at_all_and_goes_on(bench: Bench) -> None:
    hidden = states(1, 2 * SEGMENT_TOKENS + 3)
    await bench.answer(hidden[:, :-3])
    bench.computed.take()
    async with bench.session() as session:
        parts = [await session.step(Step(hidden[:, :-3], 0))]
        assert bench.computed.take() == 0
        parts += [await session.step(Step(hidden[:, at : at + 1], at)) for at in range(128, 131)]
    assert_close(torch.cat(parts, 1), bench.model.expected(hidden).detach(), **TOLERANCE, what="goes on")


async def test_a_conversation_computes_only_what_is_new(bench: Bench) -> None:
    """Each turn brings all that was said before, answers included."""
    said = states(1, 300)
    await bench.answer(said[:, :140])
    await bench.answer(said[:, :200])
    bench.computed.take()
    await bench.answer(said)
    assert bench.computed.take() == 300 - 3 * SEGMENT_TOKENS


async def test_prompts_that_part_share_what_comes_before(bench: Bench) -> None:
    first, second = states(1, 200), states(1, 200)
    second[:, 100:] = states(1, 100, seed=1)
    await bench.answer(first)
    bench.computed.take()
    await bench.answer(second)
    assert bench.computed.take() == 200 - SEGMENT_TOKENS


async def test_a_prompt_that_comes_in_several_steps(bench: Bench) -> None:
    """As petalsd's client sends long ones; where one is no whole number of segments, the chain ends."""
    hidden = states(1, 300)
    await bench.answer(hidden)
    bench.computed.take()
    for sizes, computed in (([128, 172], 300 - 4 * SEGMENT_TOKENS), ([100, 200], 300 - SEGMENT_TOKENS)):
        async with bench.session() as session:
            parts = [
                await session.step(Step(part, session.session.position)) for part in hidden.split(sizes, 1)
            ]
        assert_close(torch.cat(parts, 1), bench.model.expected(hidden).detach(), **TOLERANCE, what=str(sizes))
        assert bench.computed.take() == computed


async def test_what_comes_in_several_steps_is_kept_whole(bench: Bench) -> None:
    hidden = states(1, 320)
    async with bench.session() as session:
        for part in hidden.split([64, 128, 128], 1):
            await session.step(Step(part, session.session.position))
    bench.computed.take()
    await bench.answer(hidden)
    assert bench.computed.take() == 0


async def test_what_follows_in_a_session_from_elsewhere_is_no_beginning(bench: Bench) -> None:
    """A session that was handed over continues with the same states that another one began with."""
    before, after = states(1, SEGMENT_TOKENS), states(1, SEGMENT_TOKENS, seed=1)
    await bench.answer(after)
    async with bench.session() as giver, bench.session() as taker:
        await giver.step(Step(before, 0))
        for place in giver.session.chunks.places(range(SEGMENT_TOKENS)):
            await taker.session.write_kv(place, await giver.session.read_kv(place))
        taker.session.resume_at(SEGMENT_TOKENS)
        taken = PrefixedSession(taker.session, bench.cache, bench.heard)
        output = await taken.step(Step(after, SEGMENT_TOKENS))
    expected = bench.model.expected(torch.cat([before, after], 1)).detach()
    assert_close(output, expected[:, SEGMENT_TOKENS:], **TOLERANCE, what="what follows")


async def test_rows_of_a_batch_are_found_together(bench: Bench) -> None:
    hidden = states(3, PROMPT)
    await bench.answer(hidden)
    bench.computed.take()
    await bench.answer(hidden)
    assert bench.computed.take() == 3 * 10
    await bench.answer(hidden[:1])
    assert bench.computed.take() == PROMPT


async def test_other_clients_and_other_blocks_find_nothing(bench: Bench) -> None:
    hidden = states(1, PROMPT)
    await bench.answer(hidden)
    bench.computed.take()
    await bench.answer(hidden, peer="another")
    await bench.answer(hidden, span=BlockSpan(0, 2))
    assert bench.computed.take() == 2 * PROMPT


async def test_chunks_of_any_size_carry_the_same(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where keys and values of a segment are too many to be moved at once."""
    hidden = states(2, PROMPT)
    monkeypatch.setattr(kv_transfer, "_CHUNK_BYTES", 7 * bench.model.config.num_kv_heads * 64)
    await bench.answer(hidden)
    bench.computed.take()
    await bench.answer(hidden)
    assert bench.computed.take() == 2 * 10


async def test_short_prompts_and_those_with_prompts_of_their_own_are_left_alone(bench: Bench) -> None:
    async with bench.session() as session:
        await session.step(Step(states(1, SEGMENT_TOKENS - 1), 0))
    async with bench.session() as session:
        deep = torch.zeros(len(bench.model.span), 1, 2, 64)[..., : states(1, 1).shape[2]]
        await session.step(Step(states(1, PROMPT), 0, prompts=deep))
    assert bench.heard.prompts == []
    assert bench.cache.nbytes == 0


async def test_what_was_rolled_back_while_it_was_saved_is_not_kept(bench: Bench) -> None:
    """Else the next session with the first prompt would go on from the keys of the second."""
    hidden, other = states(1, PROMPT), states(1, PROMPT, seed=1)
    async with bench.session() as session:
        await session.step(Step(hidden, 0))
        await session.step(Step(other, 0))
    await bench.answer(hidden)


async def test_a_prompt_after_one_that_was_taken_back_whole(bench: Bench) -> None:
    hidden, other = states(1, PROMPT), states(1, PROMPT, seed=1)
    async with bench.session() as session:
        await session.step(Step(hidden, 0))
        await session.step(Step(hidden[:, :0], 0))
        await session.step(Step(other, 0))
    await bench.answer(hidden)
    await bench.answer(other)


async def test_beams_reordered_meanwhile_do_no_harm(bench: Bench) -> None:
    hidden = states(2, PROMPT)
    async with bench.session(batch=2) as session:
        await session.step(Step(hidden, 0))
        await session.step(Step(hidden[:, :1], PROMPT, hypo_ids=(1, 0)))
    await bench.answer(hidden)


async def test_a_small_cache_keeps_the_beginning(model: TinyModel) -> None:
    async with bench_over(model) as bench:
        hidden = states(1, 4 * SEGMENT_TOKENS)
        await bench.answer(hidden)
        segment_bytes = bench.cache.nbytes // 4
    async with bench_over(model, max_bytes=2 * segment_bytes) as bench:
        await bench.answer(hidden)
        bench.computed.take()
        await bench.answer(hidden)
        assert bench.computed.take() == 2 * SEGMENT_TOKENS
        assert bench.cache.nbytes == 2 * segment_bytes


async def test_without_room_nothing_is_looked_up(model: TinyModel) -> None:
    async with bench_over(model, max_bytes=0) as bench:
        await bench.answer(states(1, PROMPT))
        await bench.answer(states(1, PROMPT))
        assert bench.computed.take() == 2 * PROMPT
        assert bench.heard.prompts == []


async def test_models_whose_angles_depend_on_the_length_are_left_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a short prompt left would be wrong in a long one."""
    monkeypatch.setattr(type(bench.model.rope), "is_length_dependent", property(lambda _: True))
    async with bench.session() as session:
        assert not session.session.is_prefix_stable
        assert not session._is_prompt(Step(states(1, PROMPT), 0))


async def test_where_it_cannot_be_filled_the_prompt_is_computed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = states(1, PROMPT)
    await bench.answer(hidden)
    bench.computed.take()
    write = kv_transfer._write
    calls = iter(range(9))

    def fails_once(*args: Any) -> None:
        write(*args)
        if next(calls) == 1:
            raise EngineError("the session's pages do not fit into memory now")

    monkeypatch.setattr(kv_transfer, "_write", fails_once)
    await bench.answer(hidden)
    assert bench.computed.take() == PROMPT
    assert bench.heard.prompts[-1] == (PROMPT, 0)


async def test_a_disk_that_fails_ends_the_session(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = states(1, PROMPT)
    await bench.answer(hidden)

    def fails(*args: object) -> None:
        raise SpillError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kv_transfer, "_write", fails)
        async with bench.session() as session:
            with pytest.raises(SpillError):
                await session.step(Step(hidden, 0))
            with pytest.raises(SessionClosed):
                await session.step(Step(hidden, 0))
    await bench.answer(hidden)


async def test_a_session_that_ends_meanwhile_leaves_what_is_right(bench: Bench) -> None:
    hidden = states(1, PROMPT)
    async with bench.session() as session:
        await session.step(Step(hidden, 0))
        session.session.end("the test says so")
    await bench.answer(hidden)
    bench.computed.take()
    await bench.answer(hidden)
    assert bench.computed.take() == 10


def out_of_memory(*_: object) -> None:
    raise MemoryError


async def test_want_of_memory_costs_no_session(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = states(1, PROMPT)
    with monkeypatch.context() as patch:
        patch.setattr(PrefixCache, "put", out_of_memory)
        async with bench.session() as session:
            await session.step(Step(hidden, 0))
            await session.finish()
            await session.step(Step(hidden[:, :1], PROMPT))
    assert bench.cache.nbytes == 0
    await bench.answer(hidden)


async def test_many_at_once(bench: Bench) -> None:
    """Sessions with one beginning and ends of their own, some of which are given up."""
    common = states(1, PROMPT)

    async def one(number: int) -> None:
        hidden = torch.cat([common, states(1, 20 + number, seed=number)], 1)
        if number % 3:
            await bench.answer(hidden, peer=f"peer {number % 2}")
        else:
            with contextlib.suppress(TimeoutError):
                async with (
                    asyncio.timeout(0.002 * number),
                    bench.session(peer=f"peer {number % 2}") as session,
                ):
                    await session.step(Step(hidden, 0))

    for _ in range(3):
        await asyncio.gather(*(one(number) for number in range(12)))
    assert 0 < bench.cache.tokens_reused < bench.cache.tokens_seen


@pytest.mark.swarm
async def test_a_stock_client_gets_the_same_answer_again(tmp_path: Path) -> None:
    """Over libp2p, with the token after it."""
    cache, heard = PrefixCache(1 << 24), Heard()
    async with (
        node() as first,
        node(await joining(first, client_mode=True)) as client,
        server(first, tmp_path, prefixes=cache, observer=heard) as tiny,
    ):
        hidden = states(1, PROMPT)
        answers = []
        for _ in range(2):
            session = await tiny.stock_session(client)
            answers.append(await session.step(tiny.uid, hidden, max_length=PROMPT + 1))
            answers.append(await session.step("", hidden[:, :1]))
            assert await session.end()
        assert heard.prompts == [(PROMPT, 0), (PROMPT, PROMPT - 10)]
        assert torch.equal(answers[0][:, : PROMPT - 10], answers[2][:, : PROMPT - 10])
        assert_close(answers[3], answers[1], **TOLERANCE, what="the token after it")
