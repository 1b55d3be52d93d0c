"""Sessions that do everything at once, drawn at random: each gets what transformers computes of it alone."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from petalsd.engine.engine import Engine
from petalsd.engine.handle import Session
from petalsd.engine.kv_transfer import Place, RolledBack
from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import PassRequest, SessionSpec, Step
from petalsd.errors import SessionClosed
from petalsd.kvcache.spill import SpillArea
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel, serving, states
from tests.engine.test_adapters import ADAPTERS, Adapted
from tests.numeric import assert_close
from tests.tiers import nightly_except
from tests.tiny_models import HIDDEN_SIZE

NUM_BLOCKS = 4
MAX_TOKENS = 48
KV_TOKENS = 3 * MAX_TOKENS  # one session of three rows, where six may be open
LIMITS = EngineLimits(max_batch_tokens=32, prefill_chunk_tokens=8, max_pass_tokens=16)
NUM_PLAYERS, NUM_SESSIONS = 6, 2  # at once, and of each one after the other


@dataclass
class Text:
    """What a session was fed: ``inputs`` ``[B, n, M]``, and what prompts ``added`` to them at each block."""

    span: BlockSpan
    model: TinyModel
    inputs: torch.Tensor
    added: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.added = torch.zeros(len(self.span), *self.inputs.shape)

    def follow(self, step: Step) -> None:
        rows = list(step.hypo_ids or range(len(self.inputs)))
        new = torch.zeros(len(self.span), *step.hidden.shape)
        if step.prompts is not None:
            new[:, :, : step.prompts.shape[2]] += step.prompts
        self.inputs = torch.cat((self.inputs[rows, : step.start], step.hidden), dim=1)
        self.added = torch.cat((self.added[:, rows, : step.start], new), dim=2)

    def expected(self) -> torch.Tensor:
        hidden = self.inputs
        if not self.added.any():
            return self.model.expected(hidden, self.span)
        for block, added in zip(self.span, self.added, strict=True):
            hidden = self.model.expected(hidden + added, BlockSpan(block, block + 1))
        return hidden


class Player:
    """A client of both engines; everything that it does comes from ``draw``."""

    def __init__(self, number: int, engines: Sequence[Engine], adapted: Adapted, seed: int) -> None:
        self.name = f"player {number}"
        self.num_carried = 0
        self._engines = engines
        self._adapted = adapted
        self._draw = random.Random(1000 * seed + number)

    async def play(self) -> None:
        for _ in range(NUM_SESSIONS):
            draw = self._draw
            start = draw.choice((0, 0, 1, 2))
            span = BlockSpan(start, draw.randint(start + 1, NUM_BLOCKS))
            adapter = draw.choice((None, *ADAPTERS))
            spec = SessionSpec(span, draw.choice((1, 2, 3)), MAX_TOKENS, self.name, 10.0, adapter)
            await self._run_session(spec)
            await self._run_pass(spec)

    async def _run_session(self, spec: SessionSpec) -> None:
        text = Text(spec.span, self._adapted.models[spec.adapter], states(spec.batch, 0))
        session = await self._draw.choice(self._engines).open_session(spec)
        try:
            for _ in range(8):
                if self._draw.random() < 0.2:
                    session = await self._carry(session, text)
                await self._step(session, text)
            if self._draw.random() < 0.3:
                await self._die(session)
        finally:
            await session.close()

    async def _step(self, session: Session, text: Text) -> None:
        step = self._next_step(session)
        text.follow(step)
        answer = await session.step(step)
        with torch.no_grad():
            expected = text.expected()[:, step.start :]
        assert_close(answer, expected, 1e-4, 1e-4, f"{self.name}, {session.spec}, from {step.start}")

    def _next_step(self, session: Session) -> Step:
        draw, batch, start = self._draw, session.spec.batch, session.position
        if start == MAX_TOKENS or (start and draw.random() < 0.2):
            start = draw.randrange(start)
        tokens = min(draw.choice((1, 1, 1, 3, 11, 20)), MAX_TOKENS - start)
        hypo_ids = tuple(draw.choices(range(batch), k=batch)) if draw.random() < 0.3 else None
        prompts = None
        if draw.random() < 0.15:
            shape = len(session.spec.span), draw.choice((1, batch)), draw.randint(0, tokens)
            prompts = 0.5 * self._states(shape[0] * shape[1], shape[2]).view(*shape, HIDDEN_SIZE)
        return Step(self._states(batch, tokens), start, prompts, hypo_ids)

    async def _carry(self, giver: Session, text: Text) -> Session:
        """To any engine, also the same one, beside a step; the session that goes on."""
        taker = await self._draw.choice(self._engines).open_session(giver.spec)
        giver.copied.restart()
        stepping = asyncio.create_task(self._step(giver, text))
        try:
            await self._copy(giver, taker)
            await stepping
            await self._copy(giver, taker)
        except BaseException:
            stepping.cancel()
            taker.end("it was not carried")
            raise
        taker.resume_at(giver.position)
        giver.end("it goes on elsewhere")
        self.num_carried += 1
        return taker

    async def _copy(self, giver: Session, taker: Session) -> None:
        missing, size = giver.copied.take(), self._draw.choice((5, 16, MAX_TOKENS))
        try:
            for block in giver.spec.span:
                for start in range(missing.start, missing.stop, size):
                    end = min(missing.stop, start + size)
                    place = Place(BlockSpan(block, block + 1), start, end)
                    await taker.write_kv(place, await giver.read_kv(place))
        except RolledBack:
            giver.copied.give_back(missing)

    async def _die(self, session: Session) -> None:
        """In the middle of a step."""
        step = asyncio.create_task(session.step(self._next_step(session)))
        await asyncio.sleep(0.002 * self._draw.random())
        session.end("its client died")
        with contextlib.suppress(SessionClosed):
            await step

    async def _run_pass(self, spec: SessionSpec) -> None:
        """Forward and backward beside the others' sessions."""
        hidden, grad = (self._states(spec.batch, 20) for _ in range(2))
        inputs = hidden.clone().requires_grad_()
        expected = self._adapted.models[spec.adapter].expected(inputs, spec.span)
        (expected_grad,) = torch.autograd.grad(expected, inputs, grad)
        engine = self._draw.choice(self._engines)
        request = PassRequest(spec.span, hidden, self.name, adapter=spec.adapter)
        assert_close(await engine.forward(request), expected.detach(), 1e-4, 1e-4, f"pass of {spec}")
        request = PassRequest(spec.span, hidden, self.name, grad_output=grad, adapter=spec.adapter)
        gradient, _ = await engine.backward(request)
        assert_close(gradient, expected_grad, 1e-3, 1e-3, f"gradient of {spec}")

    def _states(self, batch: int, tokens: int) -> torch.Tensor:
        return states(batch, tokens, self._draw.randrange(1 << 30))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """Models with a sliding window in some blocks."""
    paths = [tmp_path_factory.mktemp("model") for _ in range(3)]
    models = [TinyModel(path, "qwen2", seed=seed) for seed, path in enumerate(paths)]
    return Adapted(dict(zip((None, *ADAPTERS), models, strict=True)))


@pytest.fixture
def areas(tmp_path: Path) -> Iterator[list[SpillArea]]:
    directories = [tmp_path / name for name in ("first", "second")]
    for directory in directories:
        directory.mkdir()
    yield [SpillArea(directory, max_bytes=64 << 20, keep_free_bytes=0) for directory in directories]


@pytest.mark.parametrize("seed", nightly_except(range(3), 0))
async def test_restless_sessions(adapted: Adapted, areas: list[SpillArea], seed: int) -> None:
    """Beams, rollbacks, prompts, adapters, passes, hand-overs and deaths, in too little memory."""
    with adapted.loaded() as model:
        async with (
            serving(model, LIMITS, kv_tokens=KV_TOKENS, spill=areas[0]) as first,
            serving(model, LIMITS, kv_tokens=KV_TOKENS, spill=areas[1]) as second,
        ):
            players = [Player(number, (first, second), adapted, seed) for number in range(NUM_PLAYERS)]
            await asyncio.gather(*(player.play() for player in players))
            pools = [engine.pool.stats() for engine in (first, second)]
    assert sum(player.num_carried for player in players) > 0
    assert sum(stats.pages_restored for stats in pools) > 0
