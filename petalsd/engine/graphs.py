"""Captured steps: what a device must offer for it, and how CUDA offers it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch

from petalsd.ops.memory import free_gpu_bytes

# What one graph may take of the driver's own memory: one of a long span takes some tens of MiB.
_DRIVER_BYTES = 128 << 20
# A check of torch that its oldest supported releases do not have.
_LIVENESS = "check_input_liveness"


class Graph(Protocol):
    """Launches that were captured with the addresses of what they read and write."""

    def replay(self) -> None:
        """Launch them again, in the order of the device's other work."""


class GraphBackend(Protocol):
    """Captures steps on the engine thread. Replays of its graphs must follow each other.

    They share the memory that is allocated while capturing: what one leaves there is lost when another is
    replayed.
    """

    def warm_up(self, compute: Callable[[], None]) -> None:
        """Run ``compute`` as it will be captured, so that kernels are compiled and libraries take their memory."""

    def capture(self, compute: Callable[[], None]) -> Graph:
        """Note what ``compute`` launches; whether it also runs is open. Raises what makes it impossible.

        What it launches must have run before.
        """

    def free_bytes(self) -> int:
        """Memory of the device that can be taken now, what is only kept for the next tensor included."""


class CudaGraphs:
    """Graphs of one GPU, captured on one stream of their own. Use one of it for all graphs of a device.

    Capturing stops nobody: it neither waits for the device nor gives memory back, as ``torch.cuda.graph`` would,
    so that it can go between two steps.

    is_inspected  for tests and benchmarks: what was captured can be listed (``get_graph_data``), and a graph that
                  reads memory which is gone is refused, as far as this torch can do either
    """

    def __init__(self, device: torch.device, *, is_inspected: bool = False) -> None:
        self._device = device
        self._is_inspected = is_inspected
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def warm_up(self, compute: Callable[[], None]) -> None:
        with torch.cuda.device(self._device):
            stream, current = self._own_stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            # cuBLAS has a workspace for each stream: that of captures is taken here, for good.
            with torch.cuda.stream(stream):
                compute()
            current.wait_stream(stream)

    def capture(self, compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self._device), torch.cuda.stream(self._own_stream()):
            # Graphs take the driver's memory, which cannot have what torch keeps.
            if torch.cuda.mem_get_info(self._device)[0] < _DRIVER_BYTES:
                torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph(keep_graph=self._is_inspected)
            self._fill(graph, self._live_pool(), compute)
            if self._is_inspected:
                graph.instantiate()
        self._graphs.add(graph)
        return graph

    def free_bytes(self) -> int:
        return free_gpu_bytes(self._device)

    def _fill(self, graph: torch.cuda.CUDAGraph, pool: Any, compute: Callable[[], None]) -> None:
        # Other threads may use the device meanwhile: only what this one does must be capturable.
        begin = partial(graph.capture_begin, pool=pool, capture_error_mode="thread_local")
        if self._is_inspected and _LIVENESS in signature(graph.capture_begin).parameters:
            begin = partial(begin, **{_LIVENESS: True})
        begin()
        try:
            compute()
            graph.capture_end()
        except BaseException:
            # The stream must leave the capture; and after an invalid one torch does not tell its allocator, which
            # would never give memory back any more.
            index = torch.cuda.current_device()
            for end in (graph.capture_end, partial(torch._C._cuda_endAllocateToPool, index, pool)):
                with contextlib.suppress(RuntimeError):  # it has ended already
                    end()
            raise

    def _own_stream(self) -> torch.cuda.Stream:
        """Always the same, since libraries keep memory for each stream that they have seen."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return self._stream

    def _live_pool(self) -> Any:
        """The pool of the graphs that there are. One whose graphs are all gone cannot be used again."""
        if self._pool is None or not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool
