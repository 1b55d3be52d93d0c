"""What computes a span on a device: the code of its blocks, how batches reach it, and captured graphs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from petalsd.engine.captures import Captures, Capturing, OnSettled
from petalsd.engine.core import ServedSpan
from petalsd.engine.graphed_span import GraphedSpan, capturable, parts_of
from petalsd.engine.limits import EngineLimits
from petalsd.engine.observer import EngineObserver
from petalsd.engine.runner import SpanRunner
from petalsd.engine.staging import InPlace, Staged
from petalsd.engine.step_memory import CapturableSpan, GraphLimits
from petalsd.engine.thread import EngineThread
from petalsd.errors import DeadlineExceeded
from petalsd.models.contract import Angles, Block, with_adapter
from petalsd.models.paged_span import BlockByBlock, CosSin, PagedSpan
from petalsd.models.spans import paged_span
from petalsd.ops.ragged import PagedKV


class RunnerFactory:
    """For one device. ``num_threads`` of the CPU, 0: torch's own choice.

    capturing   how steps of a span are captured; None: every step is launched anew
    on_settled  called on the loop when everything of what is served is captured, with None, or when the rest will
                not be, with the reason
    """

    def __init__(
        self,
        device: torch.device,
        num_threads: int,
        limits: EngineLimits,
        observer: EngineObserver,
        capturing: Capturing | None = None,
        on_settled: OnSettled = lambda failure: None,
    ) -> None:
        self.device = device
        self.num_threads = num_threads
        self.limits = limits
        self._observer = observer
        self._capturing = capturing
        self._on_settled = on_settled

    async def make(self, served: ServedSpan, thread: EngineThread, *, is_idle: bool) -> SpanRunner:
        """Ready to run on ``thread``. Where steps are captured, and it ``is_idle``, it has captured them there."""
        span = await asyncio.to_thread(self.make_span, served.blocks)  # sessions may go on meanwhile
        adapted = {name: self._adapted_span(served, name) for name in served.adapters}
        if not self.is_staged:
            return SpanRunner(span, served.pool, served.rope, InPlace(), adapted)
        if self.device.type == "cuda":
            # Else pinned memory would open a context on the first GPU, too.
            thread.post(partial(torch.cuda.set_device, self.device))
        kv, parts = served.pool.kv, parts_of(span)
        staging, spans = Staged(self.device, self._graph_limits(kv).max_runs), capturable(parts)
        has_angles = spans and len(spans) == len(parts) and not adapted
        angles = KnownAngles(served.rope) if has_angles else served.rope
        if not spans or self._capturing is None:
            self._on_settled(None)
            return SpanRunner(span, served.pool, angles, staging, adapted)
        captures = self._captures(self._capturing, spans, kv, partial(thread.outbox.call, self._on_settled))
        if is_idle:
            await self._capture_all(captures, thread)
        graphed = GraphedSpan(parts, captures, self._observer)
        return SpanRunner(graphed, served.pool, angles, staging, adapted)

    @property
    def is_staged(self) -> bool:
        """Whether the device has memory of its own, to which batches are copied."""
        return self.device.type != "cpu"

    def make_span(self, blocks: Mapping[int, Block]) -> PagedSpan:
        """What computes the blocks."""
        return paged_span(blocks, self.num_threads or torch.get_num_threads())

    async def measure_graphs(self, blocks: Mapping[int, Block], kv: PagedKV, thread: EngineThread) -> int:
        """Device memory that captured steps of the blocks take, over any number of such pages.

        Graphs have the addresses of the pages in them, so the pages must be there first, and cannot be sized by
        what is free afterwards. This captures everything as a trial, and throws it away. 0 where nothing is
        captured.
        """
        spans = capturable(parts_of(self.make_span(blocks)))
        if not spans or self._capturing is None:
            return 0
        trial = self._captures(self._capturing, spans, kv, lambda failure: None)
        await self._capture_all(trial, thread)
        return trial.nbytes

    async def _capture_all(self, captures: Captures, thread: EngineThread) -> None:
        """DeadlineExceeded when the thread does not come back."""
        thread.post(captures.capture_all)
        if not await thread.wait_for_commands(self.limits.step_deadline_s):
            raise DeadlineExceeded("the engine thread did not come back from capturing steps")

    def _captures(
        self, capturing: Capturing, spans: Sequence[CapturableSpan], kv: PagedKV, on_settled: OnSettled
    ) -> Captures:
        return Captures(spans, kv, self._graph_limits(kv), capturing, on_settled)

    def _graph_limits(self, kv: PagedKV) -> GraphLimits:
        return GraphLimits.of(self.limits, kv.page_tokens)

    def _adapted_span(self, served: ServedSpan, name: str) -> PagedSpan:
        blocks = {index: with_adapter(block, name) for index, block in served.blocks.items()}
        # On a CPU each span would have threads of its own.
        return self.make_span(blocks) if self.is_staged else BlockByBlock(blocks)


class KnownAngles:
    """``Angles`` for blocks that keep those of all positions themselves: a step brings none."""

    def __init__(self, angles: Angles) -> None:
        self.dtype, self.device, self.is_length_dependent = angles.dtype, angles.device, False

    def cos_sin(
        self, positions: torch.Tensor, seq_lens: torch.Tensor | None = None, end: int | None = None
    ) -> CosSin:
        """Nothing."""
        return ()

    def tables(self, end: int) -> CosSin:
        """Nothing."""
        return ()
