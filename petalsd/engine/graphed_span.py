"""Decode steps as replays of captured graphs.

A graph is captured for every (block, bucket of rows), so that any part of the span is a chain of replays, and for
(whole span, bucket). All of them work in the same static memory:

    integers  one step's rows, padded to the bucket (``ops.decode_batch.DecodeLayout``), written by one copy
    states    what stands between launches (``StepStates``); a block finds in ``residual`` and ``delta`` what the
              one before it left there, so blocks chain without copies
    plans     tables of angles and room for the parts of split contexts, one for each bucket

Padding rows attend to nothing and write nothing, and rows do not see each other; so what padding holds, be it NaN,
stays there.

A graph has the addresses of the pages in it: other pages need other graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import structlog
import torch

from petalsd.device_faults import raise_if_lost
from petalsd.engine.graphs import Graph, GraphBackend
from petalsd.engine.limits import EngineLimits
from petalsd.engine.observer import EngineObserver
from petalsd.models.paged_span import CosSin, PagedSpan
from petalsd.ops.decode_batch import (
    DECODE_BUCKETS,
    DecodeLayout,
    KernelRows,
    Places,
    bucket_of,
    pad_rows,
    round_up,
)
from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)


class States(Protocol):
    """What stands between the launches of a step; ``kernel_span.StepStates`` is the contract."""

    @property
    def nbytes(self) -> int: ...

    def first(self, tokens: int) -> States: ...

    def clear(self) -> None: ...

    def enter(self, hidden: torch.Tensor) -> None: ...

    def leave(self, tokens: int) -> torch.Tensor: ...


@runtime_checkable
class CapturableSpan(PagedSpan, Protocol):
    """Blocks that compute in memory of the caller; ``kernel_span.KernelSpan`` is the contract."""

    span: BlockSpan
    dtype: torch.dtype
    device: torch.device

    @property
    def is_length_dependent(self) -> bool: ...

    def make_states(self, tokens: int) -> States: ...

    def plan_decode(self, num_rows: int, kv: PagedKV, end: int) -> Any: ...

    def compute(self, blocks: BlockSpan, states: Any, rows: KernelRows, kv: PagedKV, plan: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """What graphs are captured for.

    max_rows    of a step
    max_runs    of a row, a multiple of 16
    max_tokens  that a row attends to
    """

    max_rows: int
    max_runs: int
    max_tokens: int

    @classmethod
    def of(cls, limits: EngineLimits, page_tokens: int) -> GraphLimits:
        """All that sessions may ask for, as far as there are buckets."""
        tokens = limits.max_session_tokens
        max_runs = round_up(-(-tokens // page_tokens))
        return cls(min(limits.max_sessions, limits.max_batch_tokens), max_runs, tokens)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Ascending; the last holds ``max_rows`` if any does."""
        largest = bucket_of(self.max_rows) or DECODE_BUCKETS[-1]
        return tuple(bucket for bucket in DECODE_BUCKETS if bucket <= largest)


class StepMemory:
    """The static memory of all graphs of a span."""

    def __init__(self, span: CapturableSpan, kv: PagedKV, limits: GraphLimits) -> None:
        largest = limits.buckets[-1]
        self._max_runs = limits.max_runs
        num_elements = DecodeLayout(largest, limits.max_runs).num_elements
        self.integers = torch.zeros(num_elements, dtype=torch.int32, device=span.device)
        self.states = span.make_states(largest)
        self.states.clear()  # they are computed on before a step has entered: no infinities there
        self.plans = {bucket: span.plan_decode(bucket, kv, limits.max_tokens) for bucket in limits.buckets}

    @property
    def nbytes(self) -> int:
        return self.integers.nbytes + self.states.nbytes

    def rows(self, bucket: int) -> KernelRows:
        """The rows that graphs of this bucket read."""
        batch = DecodeLayout(bucket, self._max_runs).batch(self.integers)
        return KernelRows(Places(batch.positions, batch.write_origins, batch.write_offsets), batch, None)

    def pad(self, bucket: int) -> None:
        """Nothing but padding rows."""
        pad_rows(DecodeLayout(bucket, self._max_runs).batch(self.integers), 0)


class GraphedSpan:
    """``PagedSpan`` that replays steps of single tokens where they were captured, and else has ``span`` compute.

    kv       whose addresses are captured
    failure  why nothing is captured, if that was tried; steps are computed all the same
    nbytes   device memory that the graphs take, their static memory included
    """

    def __init__(
        self,
        span: CapturableSpan,
        kv: PagedKV,
        limits: GraphLimits,
        backend: GraphBackend,
        observer: EngineObserver,
    ) -> None:
        self._span = span
        self._kv = kv
        self._limits = limits
        self._backend = backend
        self._observer = observer
        self._memory: StepMemory | None = None
        self._graphs: Mapping[tuple[BlockSpan, int], Graph] = {}
        self.failure: str | None = None
        self.nbytes = 0

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def capture(self) -> None:
        """Capture everything, the largest steps first, since later ones fit into what those allocated.

        On the engine thread, before the first step. ``failure`` has the reason if it went wrong; raises DeviceLost
        only.
        """
        span = str(self._span.span)
        try:
            used = self._backend.used_bytes()
            with torch.inference_mode():
                memory = StepMemory(self._span, self._kv, self._limits)
                graphs = self._capture_all(memory)
            self.nbytes = max(memory.nbytes, self._backend.used_bytes() - used)
        except Exception as error:
            raise_if_lost(error)
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("graph_capture_failed", span=span, exc_info=error, then="launched one by one")
            return
        self._memory, self._graphs = memory, graphs
        log.info("graphs_captured", span=span, graphs=len(graphs), bytes=self.nbytes)

    def _capture_all(self, memory: StepMemory) -> dict[tuple[BlockSpan, int], Graph]:
        whole = self._span.span
        parts = [BlockSpan(block, block + 1) for block in whole]
        graphs = {}
        for bucket in reversed(self._limits.buckets):
            memory.pad(bucket)
            self._compute(whole, bucket, memory)  # compiles what was not needed before
            for part in parts if len(whole) == 1 else [*parts, whole]:
                graphs[part, bucket] = self._capture(part, bucket, memory)
        return graphs

    def _capture(self, blocks: BlockSpan, bucket: int, memory: StepMemory) -> Graph:
        return self._backend.capture(lambda: self._compute(blocks, bucket, memory))

    def _compute(self, blocks: BlockSpan, bucket: int, memory: StepMemory) -> None:
        states, rows = memory.states.first(bucket), memory.rows(bucket)
        self._span.compute(blocks, states, rows, self._kv, memory.plans[bucket])

    def forward_paged(
        self, blocks: BlockSpan, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        """As ``PagedSpan``."""
        rows, memory = batch.kernel_rows, self._memory
        packed = None if rows is None or kv is not self._kv else rows.packed
        chain = () if packed is None else self._chain(blocks, batch.num_rows)
        self._observer.span_computed(is_replayed=bool(chain))
        if not chain or memory is None or packed is None:
            return self._span.forward_paged(blocks, hidden, kv, batch, cos_sin)
        memory.integers[: len(packed)].copy_(packed)
        memory.states.enter(hidden)
        for graph in chain:
            graph.replay()
        return memory.states.leave(len(hidden))

    def _chain(self, blocks: BlockSpan, num_rows: int) -> Sequence[Graph]:
        """The graphs that compute a step one after the other; none where it was not captured."""
        bucket = bucket_of(num_rows)
        if bucket is None or (BlockSpan(blocks.start, blocks.start + 1), bucket) not in self._graphs:
            return ()
        if (blocks, bucket) in self._graphs:
            return (self._graphs[blocks, bucket],)
        return [self._graphs[BlockSpan(block, block + 1), bucket] for block in blocks]
