"""Capturing decode steps, one at a time, so that sessions need not wait for all of it.

There is a graph for every (block, bucket of rows), so that any part of the blocks is a chain of replays, and one
for every (consecutive blocks that can be captured, bucket). All of them work in the same ``StepMemory``. A graph
has the addresses of pages and weights in it: other pages or weights need other graphs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import structlog
import torch

from petalsd.device_faults import raise_if_lost
from petalsd.engine.graphs import Graph, GraphBackend
from petalsd.engine.step_memory import CapturableSpan, GraphLimits, StepMemory
from petalsd.ops.ragged import PagedKV
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

# For a block that is being loaded, and for memory that is about to be given back: blocks that a move leaves keep
# theirs until the new ones are tested.
_PATIENCE_S = 60.0
# Graphs of blocks that were left, which are given up instead of a capture: hundreds at once would be felt.
_GIVEN_UP_AT_ONCE = 8

StepKey: TypeAlias = tuple[int, int, int]
"""First block, the one after the last, and the bucket."""

OnSettled: TypeAlias = Callable[[str | None], object]


@dataclass(frozen=True, slots=True)
class Capturing:
    """How steps are captured on a device.

    spare_bytes  of its memory that captures leave free: what is computed without graphs needs room too
    turn         held while a step is captured, and by whoever takes much memory of the device meanwhile: while
                 anything is captured torch gives back nothing of what it keeps, and a thread that needs it would
                 be told that there is no memory
    """

    backend: GraphBackend
    spare_bytes: int = 0
    turn: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """``sources``: what computes its blocks, whose weights the graph reads."""

    graph: Graph
    sources: tuple[object, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Missing:
    span: CapturableSpan
    blocks: BlockSpan
    bucket: int

    @property
    def key(self) -> StepKey:
        return self.blocks.start, self.blocks.end, self.bucket

    @property
    def sources(self) -> tuple[object, ...]:
        return tuple(self.span.source(block) for block in self.blocks)


class Captures:
    """The captured steps of ``spans``, over the pages of ``kv``. Belongs to the engine thread.

    on_settled  told when everything is captured (None), or that the rest will not be, and why
    memory      what they work in; None before the first is captured
    steps       those that there are
    failure     why the rest is not captured; it is computed all the same
    """

    def __init__(
        self,
        spans: Sequence[CapturableSpan],
        kv: PagedKV,
        limits: GraphLimits,
        capturing: Capturing,
        on_settled: OnSettled,
    ) -> None:
        self._kv = kv
        self._limits = limits
        self._capturing = capturing
        self._on_settled = on_settled
        self._missing = deque(_all_steps(spans, limits))
        self.num_wanted = len(self._missing)
        self.steps: dict[StepKey, CapturedStep] = {}
        self.memory: StepMemory | None = None
        self._memory_bytes = 0
        self.failure: str | None = None
        self._short_since_s: float | None = None
        self._spent: list[Graph] = []

    @property
    def num_graphs(self) -> int:
        return len(self.steps)

    @property
    def are_complete(self) -> bool:
        """Whether nothing is left to do."""
        return not self._missing and not self._spent

    @property
    def must_wait(self) -> bool:
        """Whether somebody else has the turn just now, or memory that is about to be free."""
        return self._short_since_s is not None or self._capturing.turn.locked()

    @property
    def nbytes(self) -> int:
        """Device memory that the graphs take, with what they work in."""
        return self._memory_bytes + sum(step.nbytes for step in tuple(self.steps.values()))

    def are_over(self, kv: PagedKV) -> bool:
        """Whether these are the pages whose addresses were captured."""
        return kv is self._kv

    def take_over(self, before: Captures) -> None:
        """Have the graphs of ``before``, which computed until now, as far as they are of the same blocks.

        The others hold no weights any more, and are given up in the turns of ``capture_next``.
        """
        if before.memory is None or not before.are_over(self._kv) or before._limits != self._limits:
            return
        self.memory, self._memory_bytes = before.memory, before._memory_bytes
        for missing in self._missing:
            step = before.steps.get(missing.key)
            if step is not None and step.sources == missing.sources:
                self.steps[missing.key] = step
        self._missing = deque(missing for missing in self._missing if missing.key not in self.steps)
        spent = (step.graph for key, step in before.steps.items() if self.steps.get(key) is not step)
        self._spent = [*before._spent, *spent]
        if not self._missing:
            self._settle()

    def capture_all(self) -> None:
        """Capture what is missing, as ``capture_next``, where no session waits for it."""
        while self._missing:
            if not self._capturing.turn.acquire(timeout=_PATIENCE_S):
                self._end(TimeoutError("a block that is being loaded does not come to an end"))
                return
            self._capture_first()

    def capture_next(self) -> None:
        """Capture one of the steps that are missing, if any is; later, when it is not our turn.

        What goes wrong ends capturing, and ``failure`` says why; raises DeviceLost only.
        """
        if self._spent:
            del self._spent[-_GIVEN_UP_AT_ONCE:]
            return
        if not self._missing or self._is_awaiting_memory():
            return
        if self._capturing.turn.acquire(blocking=False):
            self._capture_first()

    def _capture_first(self) -> None:
        """In our turn, which is over then."""
        missing = self._missing[0]
        try:
            with torch.inference_mode():
                self.steps[missing.key] = self._capture(missing)
        except Exception as error:
            raise_if_lost(error)
            self._end(error)
            return
        finally:
            self._capturing.turn.release()
        self._missing.popleft()
        if not self._missing:
            self._settle()

    def _end(self, error: Exception) -> None:
        """Capture no more; what there is stays."""
        self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        log.warning("graph_capture_failed", graphs=len(self.steps), wanted=self.num_wanted, exc_info=error)
        self._missing.clear()
        if not self.steps:
            self.memory, self._memory_bytes = None, 0
        self._settle()

    def _is_awaiting_memory(self) -> bool:
        """Whether there is too little now but may be soon: blocks that were left have theirs for a moment more."""
        if self._free_bytes() >= self._least_bytes:
            self._short_since_s = None
            return False
        now_s = time.monotonic()
        if self._short_since_s is None:
            self._short_since_s = now_s
        return now_s - self._short_since_s < _PATIENCE_S

    def _free_bytes(self) -> int:
        return self._capturing.backend.free_bytes()

    @property
    def _least_bytes(self) -> int:
        """What must be free for the next capture."""
        return self._capturing.spare_bytes + max((step.nbytes for step in self.steps.values()), default=0)

    def _capture(self, missing: _Missing) -> CapturedStep:
        backend, free = self._capturing.backend, self._free_bytes()
        if free < self._least_bytes:
            raise MemoryError(f"{free >> 20} MiB of the device are left, which is for what is not captured")
        if self.memory is None:
            self.memory = StepMemory(missing.span, self._kv, self._limits)
            left = self._free_bytes()
            self._memory_bytes, free = max(0, free - left), left
        span, blocks, bucket = missing.span, missing.blocks, missing.bucket
        self.memory.pad(bucket)
        states, rows = self.memory.states.first(bucket), self.memory.rows(bucket)
        compute = partial(span.compute, blocks, states, rows, self._kv, self.memory.plans[bucket])
        if len(missing.blocks) == 1:  # others consist of these
            backend.warm_up(compute)
        graph = backend.capture(compute)
        return CapturedStep(graph, missing.sources, max(0, free - self._free_bytes()))

    def _settle(self) -> None:
        if self.failure is None:
            log.info("graphs_captured", graphs=len(self.steps), bytes=self.nbytes)
        self._on_settled(self.failure)


def _all_steps(spans: Sequence[CapturableSpan], limits: GraphLimits) -> list[_Missing]:
    """The largest first, since later ones fit into what those allocated."""
    return [
        _Missing(span, blocks, bucket)
        for bucket in reversed(limits.buckets)
        for span in spans
        for blocks in _captured_alone(span.span)
    ]


def _captured_alone(whole: BlockSpan) -> list[BlockSpan]:
    singles = [BlockSpan(block, block + 1) for block in whole]
    return singles if len(whole) == 1 else [*singles, whole]
