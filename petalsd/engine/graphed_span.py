"""Decode steps as replays of captured graphs, as far as there are any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, TypeAlias

import torch

from petalsd.engine.captures import Captures
from petalsd.engine.graphs import Graph
from petalsd.engine.observer import EngineObserver
from petalsd.engine.step_memory import CapturableSpan
from petalsd.models.paged_span import ChainedSpans, CosSin, PagedSpan
from petalsd.ops.decode_batch import bucket_of
from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.types import BlockSpan

Parts: TypeAlias = Sequence[tuple[BlockSpan, PagedSpan]]


class _Run(NamedTuple):
    """Consecutive blocks of a step: by these graphs, one after the other, or by ``span`` where there are none."""

    span: PagedSpan
    blocks: BlockSpan
    graphs: Sequence[Graph]


class GraphedSpan:
    """``PagedSpan`` over ``parts`` that replays steps of single tokens where they were captured.

    What was not is computed by the parts: blocks that cannot be captured, or are not yet, and all other batches.
    """

    def __init__(self, parts: Parts, captures: Captures, observer: EngineObserver) -> None:
        self._parts = parts
        self.captures = captures
        self._observer = observer

    def forward_paged(
        self, blocks: BlockSpan, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        """As ``PagedSpan``."""
        memory, rows = self.captures.memory, batch.kernel_rows
        packed = None if rows is None or not self.captures.are_over(kv) else rows.packed
        bucket = None if packed is None else bucket_of(batch.num_rows)
        has_rows = False
        for run in self._runs(blocks, bucket):
            self._observer.span_computed(is_replayed=bool(run.graphs))
            if not run.graphs or memory is None or packed is None:
                hidden = run.span.forward_paged(run.blocks, hidden, kv, batch, cos_sin)
                continue
            if not has_rows:
                memory.integers[: len(packed)].copy_(packed)
                has_rows = True
            memory.states.enter(hidden)
            for graph in run.graphs:
                graph.replay()
            hidden = memory.states.leave(len(hidden))
        return hidden

    def _runs(self, blocks: BlockSpan, bucket: int | None) -> Iterator[_Run]:
        """The fewest that compute ``blocks``, in their order."""
        for served, span in self._parts:
            asked = served.intersect(blocks)
            if asked is not None:
                yield from self._runs_of(span, asked, bucket)

    def _runs_of(self, span: PagedSpan, asked: BlockSpan, bucket: int | None) -> Iterator[_Run]:
        """The same within one part."""
        steps = self.captures.steps
        if bucket is None:
            yield _Run(span, asked, ())
        elif whole := steps.get((asked.start, asked.end, bucket)):
            yield _Run(span, asked, (whole.graph,))
        else:
            for is_captured, group in groupby(asked, lambda block: (block, block + 1, bucket) in steps):
                found = list(group)
                graphs = [steps[block, block + 1, bucket].graph for block in found] if is_captured else ()
                yield _Run(span, BlockSpan(found[0], found[-1] + 1), graphs)


def parts_of(span: PagedSpan) -> Parts:
    """Of which ``span`` consists; none where nothing of it could be captured."""
    if isinstance(span, ChainedSpans):
        return span.parts
    return [(span.span, span)] if isinstance(span, CapturableSpan) else []


def capturable(parts: Parts) -> list[CapturableSpan]:
    """Those whose steps can be captured. They share their memory, so only those of the first one's kind."""
    found = [span for _, span in parts if isinstance(span, CapturableSpan) and span.is_capturable]
    return [span for span in found if type(span) is type(found[0])]
