"""A model served as on a GPU, on the CPU: kernels in the interpreter, staged batches, graphs by a double."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import torch

from petalsd.engine.captures import Capturing
from petalsd.engine.engine import Engine
from petalsd.engine.graphs import GraphBackend
from petalsd.engine.limits import EngineLimits
from petalsd.engine.observer import EngineObserver, NullObserver
from petalsd.engine.runners import RunnerFactory
from petalsd.engine.step import SessionSpec, Step
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.sizing import KVGeometry
from petalsd.models.block import TransformerBlock
from petalsd.models.contract import Block
from petalsd.models.gpu_products import GpuProducts
from petalsd.models.hf.block import LayerBlock
from petalsd.models.hf.layer_span import LayerSpan
from petalsd.models.hf.norms import replace_norms
from petalsd.models.hf.stand_ins import leave_kernels
from petalsd.models.kernel_span import KernelSpan
from petalsd.models.paged_span import PagedSpan
from petalsd.types import BlockSpan
from tests.engine.rig import CPU, PAGE_TOKENS, TinyModel
from tests.models.kernel_blocks import NUM_SMS, unpacked

LIMITS = EngineLimits(max_batch_tokens=32, prefill_chunk_tokens=8, max_sessions=4, max_session_tokens=64)
NUM_TOKENS = 3


class KernelRunners(RunnerFactory):
    """What a GPU's factory makes, over blocks of one model on the CPU."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._unpacked: dict[Block, TransformerBlock] = {}

    @property
    def is_staged(self) -> bool:
        return True

    def make_span(self, blocks: Mapping[int, Block]) -> PagedSpan:
        return KernelSpan(self.unpacked(blocks), NUM_SMS)

    def unpacked(self, blocks: Mapping[int, Block]) -> dict[int, TransformerBlock]:
        """Over plain tensors, which are the same ones each time."""
        for block in blocks.values():
            if block not in self._unpacked and isinstance(block, TransformerBlock):
                self._unpacked[block] = unpacked(block)
        return {index: self._unpacked[block] for index, block in blocks.items()}


class StagedRunners(RunnerFactory):
    """What a GPU's factory makes for blocks that no kernel computes."""

    @property
    def is_staged(self) -> bool:
        return True


class LayerRunners(StagedRunners):
    """The same for layers of transformers, with attention and norms by kernels; those of a CPU no tape records."""

    def make_span(self, blocks: Mapping[int, Block]) -> PagedSpan:
        layers = {i: block for i, block in blocks.items() if isinstance(block, LayerBlock)}
        for block in layers.values():
            leave_kernels(block.layer)
            replace_norms(block.layer, GpuProducts(CPU, NUM_SMS).norm)
        return LayerSpan(layers, NUM_SMS)


class Counter(NullObserver):
    def __init__(self) -> None:
        self.runs = {True: 0, False: 0}

    def span_computed(self, *, is_replayed: bool) -> None:
        self.runs[is_replayed] += 1


def geometry_of(model: TinyModel, page_tokens: int = PAGE_TOKENS) -> KVGeometry:
    return KVGeometry(page_tokens, model.config.num_kv_heads, model.config.head_dim, torch.float32)


@asynccontextmanager
async def serving(
    model: TinyModel,
    observer: EngineObserver,
    graphs: GraphBackend | None = None,
    runners: RunnerFactory | None = None,
    span: BlockSpan | None = None,
) -> AsyncIterator[Engine]:
    """These blocks of the model, or all, with pages of garbage."""
    capturing = None if graphs is None else Capturing(graphs)
    runners = runners or KernelRunners(CPU, 1, LIMITS, observer, capturing)
    engine = Engine(runners.limits, CPU, 1, observer, runners)
    pool = KVPool(geometry_of(model), 64, torch.float32, CPU)
    for slab in pool.allocate().slabs:
        slab.fill_(torch.nan)
    await engine.start()
    try:
        served = {index: model.blocks[index] for index in span or model.span}
        await engine.load_span(served, pool, model.rope)
        yield engine
    finally:
        await engine.stop(deadline_s=10)


def greedy(model: TinyModel, hidden: torch.Tensor) -> int:
    """The next token after the last of these states ``[1, n, M]``."""
    reference: Any = model.reference
    with torch.no_grad():
        return int(reference.lm_head(reference.model.norm(hidden[:, -1])).argmax())


async def generate(engine: Engine, model: TinyModel, prompt: list[int], cut: int) -> list[int]:
    """Tokens through two sessions, of the blocks before and after ``cut``; 0: one of all blocks."""
    whole = model.span
    spans = [BlockSpan(0, cut), BlockSpan(cut, whole.end)] if cut else [whole]
    embedding: Any = model.reference.get_input_embeddings()
    sessions = [await engine.open_session(SessionSpec(span, 1, 48, f"peer-{cut}")) for span in spans]
    tokens, new = [], prompt
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            hidden = embedding(torch.tensor([new]))
        for session in sessions:
            hidden = await session.step(Step(hidden, session.position))
        new = [greedy(model, hidden)]
        tokens += new
    for session in sessions:
        await session.close()
    return tokens
