"""Captured steps: what a device must offer for it, and how CUDA offers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Launches that were captured with the addresses of what they read and write."""

    def replay(self) -> None:
        """Launch them again, in the order of the device's other work."""


class GraphBackend(Protocol):
    """Captures the steps of one span, on the engine thread. Replays of its graphs must follow each other.

    They share the memory that is allocated while capturing: what one leaves there is lost when another is
    replayed.
    """

    def capture(self, compute: Callable[[], None]) -> Graph:
        """Note what ``compute`` launches; whether it also runs is open. Raises what makes it impossible.

        It must have run before, so that kernels are compiled and libraries have taken their memory.
        """

    def used_bytes(self) -> int:
        """Memory of the device that is in use, by whoever it is; not what is only kept for the next tensor."""


class CudaGraphs:
    """Graphs of one GPU, in one memory pool and captured on one stream of their own.

    is_inspected  for tests and benchmarks: what was captured can be listed (``get_graph_data``), and a graph that
                  reads memory which is gone is refused
    """

    def __init__(self, device: torch.device, *, is_inspected: bool = False) -> None:
        self._device = device
        self._is_inspected = is_inspected
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def capture(self, compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self._device):
            if self._stream is None or self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            graph = torch.cuda.CUDAGraph(keep_graph=self._is_inspected)
            # Other threads may use the device meanwhile: only what this one does must be capturable.
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
                check_input_liveness=self._is_inspected,
            ):
                compute()
            if self._is_inspected:
                graph.instantiate()
        return graph

    def used_bytes(self) -> int:
        torch.cuda.empty_cache()  # as a capture does, which would look as if it freed memory
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free
