"""The memory that captured decode steps work in, which never moves.

    integers  one step's rows, padded to the bucket (``ops.decode_batch.DecodeLayout``), written by one copy
    states    what stands between launches (``StepStates``); a block finds in ``residual`` and ``delta`` what the
              one before it left there, so blocks chain without copies
    plans     tables of angles and room for the parts of split contexts, one for each bucket

Padding rows attend to nothing and write nothing, and rows do not see each other; so what padding holds, be it NaN,
stays there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from petalsd.engine.limits import EngineLimits
from petalsd.models.paged_span import PagedSpan
from petalsd.ops.decode_batch import (
    DECODE_BUCKETS,
    DecodeLayout,
    KernelRows,
    Places,
    bucket_of,
    pad_rows,
    round_up,
)
from petalsd.ops.ragged import PagedKV
from petalsd.types import BlockSpan


class States(Protocol):
    """What stands between the launches of a step; ``kernel_span.StepStates`` is the contract."""

    def first(self, tokens: int) -> States: ...

    def clear(self) -> None: ...

    def enter(self, hidden: torch.Tensor) -> None: ...

    def leave(self, tokens: int) -> torch.Tensor: ...


@runtime_checkable
class CapturableSpan(PagedSpan, Protocol):
    """Blocks that compute in memory of the caller; ``kernel_span.KernelSpan`` is the contract."""

    span: BlockSpan
    device: torch.device

    @property
    def is_capturable(self) -> bool: ...

    def source(self, block: int) -> object: ...

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
    """The static memory of all graphs over the pages of ``kv``, made by any span of the model's blocks."""

    def __init__(self, span: CapturableSpan, kv: PagedKV, limits: GraphLimits) -> None:
        largest = limits.buckets[-1]
        self._max_runs = limits.max_runs
        num_elements = DecodeLayout(largest, limits.max_runs).num_elements
        self.integers = torch.zeros(num_elements, dtype=torch.int32, device=span.device)
        self.states = span.make_states(largest)
        self.states.clear()  # they are computed on before a step has entered: no infinities there
        self.plans = {bucket: span.plan_decode(bucket, kv, limits.max_tokens) for bucket in limits.buckets}

    def rows(self, bucket: int) -> KernelRows:
        """The rows that graphs of this bucket read."""
        batch = DecodeLayout(bucket, self._max_runs).batch(self.integers)
        return KernelRows(Places(batch.positions, batch.write_origins, batch.write_offsets), batch, None)

    def pad(self, bucket: int) -> None:
        """Nothing but padding rows."""
        pad_rows(DecodeLayout(bucket, self._max_runs).batch(self.integers), 0)
