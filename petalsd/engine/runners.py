"""What computes a span on a device: the code of its blocks, how batches reach it, and captured graphs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial

import torch

from petalsd.engine.core import ServedSpan
from petalsd.engine.graphed_span import CapturableSpan, GraphedSpan, GraphLimits
from petalsd.engine.graphs import GraphBackend
from petalsd.engine.limits import EngineLimits
from petalsd.engine.observer import EngineObserver
from petalsd.engine.runner import SpanRunner
from petalsd.engine.staging import InPlace, Staged
from petalsd.engine.thread import EngineThread
from petalsd.errors import DeadlineExceeded
from petalsd.models.contract import Angles, Block
from petalsd.models.native_span import paged_span
from petalsd.models.paged_span import CosSin, PagedSpan
from petalsd.ops.ragged import PagedKV


class RunnerFactory:
    """For one device. ``num_threads`` of the CPU, 0: torch's own choice.

    make_graphs  makes what captures the steps of a span; None: every step is launched anew
    """

    def __init__(
        self,
        device: torch.device,
        num_threads: int,
        limits: EngineLimits,
        observer: EngineObserver,
        make_graphs: Callable[[], GraphBackend] | None = None,
    ) -> None:
        self._device = device
        self._num_threads = num_threads
        self._limits = limits
        self._observer = observer
        self._make_graphs = make_graphs

    async def make(self, served: ServedSpan, thread: EngineThread) -> SpanRunner:
        """Ready to run on ``thread``: where steps are captured, it has captured them there."""
        span = await asyncio.to_thread(self.make_span, served.blocks)  # sessions may go on meanwhile
        if not self.is_staged:
            return SpanRunner(span, served.pool, served.rope, InPlace())
        if self._device.type == "cuda":
            # Else pinned memory would open a context on the first GPU, too.
            thread.post(partial(torch.cuda.set_device, self._device))
        staging = Staged(self._device, self._graph_limits(served.pool.kv).max_runs)
        if not isinstance(span, CapturableSpan) or span.is_length_dependent:
            return SpanRunner(span, served.pool, served.rope, staging)
        graphed = await self._captured(span, served.pool.kv, thread)
        return SpanRunner(graphed or span, served.pool, KnownAngles(served.rope), staging)

    @property
    def is_staged(self) -> bool:
        """Whether the device has memory of its own, to which batches are copied."""
        return self._device.type != "cpu"

    def make_span(self, blocks: Mapping[int, Block]) -> PagedSpan:
        """What computes the blocks."""
        return paged_span(blocks, self._num_threads or torch.get_num_threads())

    async def measure_graphs(self, blocks: Mapping[int, Block], kv: PagedKV, thread: EngineThread) -> int:
        """Device memory that captured steps of the blocks take, over any number of such pages.

        Graphs have the addresses of the pages in them, so the pages must be there first, and cannot be sized by
        what is free afterwards. This captures everything as a trial, and throws it away. 0 where nothing is
        captured, or capturing fails.
        """
        span = self.make_span(blocks)
        if not isinstance(span, CapturableSpan) or span.is_length_dependent:
            return 0
        trial = await self._captured(span, kv, thread)
        return 0 if trial is None else trial.nbytes

    async def _captured(self, span: CapturableSpan, kv: PagedKV, thread: EngineThread) -> GraphedSpan | None:
        """None where no graphs are wanted. DeadlineExceeded when the thread does not come back."""
        if self._make_graphs is None:
            return None
        graphed = GraphedSpan(span, kv, self._graph_limits(kv), self._make_graphs(), self._observer)
        thread.post(graphed.capture)
        if not await thread.wait_for_commands(self._limits.step_deadline_s):
            raise DeadlineExceeded("the engine thread did not come back from capturing steps")
        return graphed

    def _graph_limits(self, kv: PagedKV) -> GraphLimits:
        return GraphLimits.of(self._limits, kv.page_tokens)


class KnownAngles:
    """``Angles`` for blocks that keep those of all positions themselves: a step brings none."""

    def __init__(self, angles: Angles) -> None:
        self.dtype, self.device, self.is_length_dependent = angles.dtype, angles.device, False

    def cos_sin(
        self, positions: torch.Tensor, seq_lens: torch.Tensor | None = None, end: int | None = None
    ) -> CosSin:
        """Nothing."""
        return ()
