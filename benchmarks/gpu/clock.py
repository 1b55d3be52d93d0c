"""How long work takes on the device: the contract, and CUDA's events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks.timing import Work

# Larger than the second-level cache of any card; reading it takes longer than the host needs to start the work.
_FLUSH_BYTES = 512 << 20
_WARM_UPS = 3


class Clock(Protocol):
    """Times work on one device."""

    def seconds(self, work: Work, samples: int, *, is_replayed: bool = True) -> list[float]:
        """Of each of so many runs of ``work``, from a cold second-level cache, as a captured graph or as it is."""

    def num_kernels(self, work: Work) -> int:
        """Kernels that one run of ``work`` starts on the device."""


class CudaClock:
    """What is replayed is captured first, as a server does, so that starting it does not count. Work that cannot
    be captured is started anew each time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._flushed = self._flush.new_empty(())

    def seconds(self, work: Work, samples: int, *, is_replayed: bool = True) -> list[float]:
        replay = self._captured(work) if is_replayed else work
        replay()
        events = [(_event(), _event()) for _ in range(samples)]
        for start, end in events:
            # Only read: what was written would be in the cache, and the work would wait until it is in memory.
            torch.amax(self._flush, 0, out=self._flushed)
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def num_kernels(self, work: Work) -> int:
        replay = self._captured(work)
        torch.cuda.synchronize(self._device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            replay()
            torch.cuda.synchronize(self._device)
        names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in names)

    def _captured(self, work: Work) -> Callable[[], Any]:
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):  # compiles, and lets libraries take their memory
                work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError:  # it reads from the device, or allocates what cannot be captured
            torch.cuda.synchronize(self._device)
            return work
        return graph.replay


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
