"""Blocks whose decode steps can be captured, over pages of garbage."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from petalsd.engine.batch import BatchItem
from petalsd.engine.captures import Captures, Capturing
from petalsd.engine.graphed_span import GraphedSpan
from petalsd.engine.graphs import GraphBackend
from petalsd.engine.observer import EngineObserver, NullObserver
from petalsd.engine.staging import Staged
from petalsd.engine.step_memory import GraphLimits
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest, KVSession
from petalsd.kvcache.sizing import KVGeometry
from petalsd.models.paged_span import PagedSpan
from petalsd.ops.ragged import RaggedBatch
from petalsd.types import BlockSpan

CPU = torch.device("cpu")
LIMITS = GraphLimits(max_rows=4, max_runs=16, max_tokens=256)
WHOLE = BlockSpan(0, 2)
SINGLES = [BlockSpan(block, block + 1) for block in WHOLE]
PAGE_TOKENS = 16


class Counter(NullObserver):
    """Counts what is replayed and what is not."""

    def __init__(self) -> None:
        self.runs = {True: 0, False: 0}

    def span_computed(self, *, is_replayed: bool) -> None:
        self.runs[is_replayed] += 1


class Scene:
    """A ``CapturableSpan``, pages full of NaN, and rows at different places whose contexts are random.

    told  what was said of captures
    """

    def __init__(self, span: Any, starts: list[int]) -> None:
        self.span, self.told = span, list[str | None]()
        self.staging = Staged(CPU, LIMITS.max_runs)
        config = span.config
        geometry = KVGeometry(PAGE_TOKENS, config.num_kv_heads, config.head_dim, torch.float32)
        self.pool = KVPool(geometry, 64, torch.float32, CPU)
        self.pool.allocate()
        hidden = torch.randn(len(starts), config.hidden_size, generator=torch.Generator().manual_seed(3))
        self.items = [
            BatchItem(span.span, asyncio.run(self._reserve(start)), 1, start, 1, start + 1, states)
            for start, states in zip(starts, hidden.split(1), strict=True)
        ]

    async def _reserve(self, start: int) -> KVSession:
        kv = await self.pool.reserve(KVRequest(0, len(self.span.span), 1, 64), timeout_s=0)
        kv.extend(start + 1)
        return kv

    def batch(self) -> RaggedBatch:
        """Of the new tokens, whose contexts are the same each time; all else in the pages is NaN."""
        batch, _ = self.staging.build(self.items, self.pool, [])
        generator = torch.Generator().manual_seed(4)
        for slab in self.pool.kv.slabs:
            slab.fill_(torch.nan)
            for row, item in enumerate(self.items):
                for position in range(item.start):
                    origin = int(batch.ragged.origins[row, position // PAGE_TOKENS])
                    for block in self.span.span:
                        place = slab[origin + block, position % PAGE_TOKENS]
                        place.copy_(torch.randn(place.shape, generator=generator))
        return batch.ragged

    @torch.inference_mode()
    def step(self, span: PagedSpan, runs: Sequence[BlockSpan] = ()) -> torch.Tensor:
        """The new tokens through ``runs``, or all blocks at once."""
        batch, hidden = self.batch(), self.staging.bring([item.hidden for item in self.items])
        for run in runs or [self.span.span]:
            hidden = span.forward_paged(run, hidden, self.pool.kv, batch, ())
        return hidden

    def capture(self, graphs: GraphBackend, observer: EngineObserver | None = None) -> GraphedSpan:
        """With everything captured."""
        captures = Captures([self.span], self.pool.kv, LIMITS, Capturing(graphs), self.told.append)
        captures.capture_all()
        return GraphedSpan([(self.span.span, self.span)], captures, observer or NullObserver())
