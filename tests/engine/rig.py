"""What the engine's tests stand on: a tiny model in our blocks, transformers as its reference, an engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from petalsd.engine.cache_geometry import cache_geometry
from petalsd.engine.engine import Engine
from petalsd.engine.handle import Session
from petalsd.engine.limits import EngineLimits
from petalsd.engine.observer import EngineObserver
from petalsd.engine.step import SessionSpec, Step
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.sizing import pages_for
from petalsd.kvcache.spill import SpillArea
from petalsd.kvcache.waiting import AdmissionRules
from petalsd.models.architecture import Architecture
from petalsd.models.contract import Block
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.source import ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.types import BlockSpan
from tests.reference_layers import through_layers
from tests.tiny_models import HIDDEN_SIZE, make_tiny

CPU = torch.device("cpu")
PAGE_TOKENS = 16
_ALL_FOR_ONE = AdmissionRules()


class TinyModel:
    """A random model of ``family``: our blocks of it, on the best rung or ``rung``, and the reference."""

    def __init__(self, path: Path, family: str = "llama", rung: Rung | None = None, **overrides: Any) -> None:
        self.reference: PreTrainedModel = make_tiny(family, path, **overrides)
        source = ModelSource(str(path))
        ladder = Ladder(
            Architecture.read(source.config()),
            source,
            WeightStorage.choose(torch.float32, CPU),
            num_threads=1,
        )
        self.config = ladder.architecture.config
        self.rope = ladder.angles
        self.blocks = {
            index: ladder.load(index) if rung is None else ladder.build(rung, index)
            for index in range(self.config.num_blocks)
        }
        self.choices = ladder.choices

    @property
    def span(self) -> BlockSpan:
        return BlockSpan(0, self.config.num_blocks)

    def pool(
        self, kv_tokens: int = 512, spill: SpillArea | None = None, rules: AdmissionRules = _ALL_FOR_ONE
    ) -> KVPool:
        """Room for ``kv_tokens`` tokens in each block, in pages of garbage."""
        geometry = cache_geometry(self.config, PAGE_TOKENS, torch.float32, CPU)
        num_pages = pages_for(kv_tokens, self.config.num_blocks, PAGE_TOKENS)
        pool = KVPool(geometry, num_pages, torch.float32, CPU, rules, spill)
        kv = pool.allocate()
        for slab in kv.slabs:
            slab.fill_(torch.nan)
        return pool

    def expected(self, hidden: torch.Tensor, span: BlockSpan | None = None) -> torch.Tensor:
        """transformers' states after the blocks of ``span`` for ``[B, n, M]`` from position 0; differentiable."""
        return through_layers(self.reference, hidden, span or self.span)


def states(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random hidden states ``[batch, tokens, M]``."""
    return torch.randn(batch, tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


@asynccontextmanager
async def serving(
    model: TinyModel,
    limits: EngineLimits | None = None,
    blocks: Mapping[int, Block] | None = None,
    kv_tokens: int = 512,
    observer: EngineObserver | None = None,
    spill: SpillArea | None = None,
) -> AsyncIterator[Engine]:
    """An engine over all blocks of ``model``; at the end no page may be held and the pool must be sound."""
    engine = Engine(limits or EngineLimits(), CPU, num_threads=1, observer=observer)
    pool = model.pool(kv_tokens, spill)
    await engine.start()
    try:
        await engine.load_span(blocks or model.blocks, pool, model.rope)
        yield engine
        await engine.drop_span("the test is over")
    finally:
        await engine.stop(deadline_s=10)
    pool.check_integrity()
    stats = pool.stats()
    assert (stats.sessions, stats.pages_reserved, stats.pages_mapped, stats.waiters) == (0, 0, 0, 0)


@asynccontextmanager
async def opened(
    engine: Engine, span: BlockSpan | None = None, batch: int = 1, max_tokens: int = 64, peer: str = "peer"
) -> AsyncIterator[Session]:
    """A session, closed at the end; over everything that is served unless ``span`` says otherwise."""
    assert engine.span is not None
    session = await engine.open_session(SessionSpec(span or engine.span, batch, max_tokens, peer))
    try:
        yield session
    finally:
        await session.close()


async def feed(session: Session, hidden: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Step through ``hidden`` ``[B, n, M]`` in steps of these sizes; the concatenated answers."""
    answers = [await session.step(Step(part, session.position)) for part in hidden.split(chunks, dim=1)]
    return torch.cat(answers, dim=1)


class HookedBlock:
    """A block that calls ``hook(hidden)`` before it computes; what the hook raises, the block raises."""

    def __init__(self, block: Block, hook: Callable[[torch.Tensor], None]) -> None:
        self._block = block
        self._hook = hook
        self.dtype = block.dtype
        self.config = block.config
        self.adapted = block.adapted

    def forward_paged(self, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        self._hook(hidden)
        return self._block.forward_paged(hidden, *args)

    def forward_dense(self, hidden: torch.Tensor) -> torch.Tensor:
        self._hook(hidden)
        return self._block.forward_dense(hidden)


def with_hook(model: TinyModel, block: int, hook: Callable[[torch.Tensor], None]) -> dict[int, Any]:
    """The model's blocks, one of them hooked."""
    return {**model.blocks, block: HookedBlock(model.blocks[block], hook)}


class Gate:
    """Holds the engine thread inside a block until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, hidden: torch.Tensor) -> None:
        self.reached.set()
        assert self.opened.wait(timeout=30), "nobody opened the gate"

    async def wait_until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 30)
