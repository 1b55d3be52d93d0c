"""What ``CudaGraphs`` asks of torch, which is replaced here: its streams, pools and captures need a GPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from petalsd.engine.graphs import CudaGraphs

DEVICE = torch.device("cuda:0")


class FakeStream:
    def __init__(self, torch_double: FakeTorch, name: str) -> None:
        self._double, self.name = torch_double, name

    def wait_stream(self, other: FakeStream) -> None:
        self._double.calls.append(f"{self.name} waits for {other.name}")


class FakeTorch:
    """Notes ``calls``. ``fails_to_end``: a capture that met an error, or finds no memory, cannot be ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.stream = FakeStream(self, "default")
        self.free_bytes = 8 << 30
        self.fails_to_end = False
        streams, pools = itertools.count(), itertools.count()
        replaced = {
            "device": lambda device: contextlib.nullcontext(),
            "stream": self.on_stream,
            "current_stream": lambda: self.stream,
            "current_device": lambda: 0,
            "Stream": lambda device: FakeStream(self, f"stream {next(streams)}"),
            "graph_pool_handle": lambda: (0, next(pools)),
            "mem_get_info": lambda device: (self.free_bytes, 80 << 30),
            "empty_cache": lambda: self.calls.append("empty the cache"),
            "CUDAGraph": lambda keep_graph: FakeGraph(self),
        }
        for name, fake in replaced.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateToPool",
            lambda index, pool: self.calls.append(f"no more allocations to {pool}"), raising=False,
        )  # fmt: skip

    @contextlib.contextmanager
    def on_stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def compute(self) -> None:
        self.calls.append(f"compute on {self.stream.name}")


class FakeGraph:
    def __init__(self, torch_double: FakeTorch) -> None:
        self._double = torch_double

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self._double.calls.append(f"begin {capture_error_mode} in {pool}")

    def capture_end(self) -> None:
        self._double.calls.append("end")
        if self._double.fails_to_end:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    return FakeTorch(monkeypatch)


def test_a_step_runs_before_it_is_captured_where_it_is_captured(double: FakeTorch) -> None:
    """In the order of the steps around it, on one stream for all; others may use the device meanwhile."""
    graphs = CudaGraphs(DEVICE)
    graphs.warm_up(double.compute)
    kept = [graphs.capture(double.compute) for _ in range(2)]
    captured = ["begin thread_local in (0, 0)", "compute on stream 0", "end"]
    assert double.calls == [
        "stream 0 waits for default", "compute on stream 0", "default waits for stream 0", *captured, *captured,
    ]  # fmt: skip
    del kept
    graphs.capture(double.compute)
    assert double.calls[-3] == "begin thread_local in (0, 1)"  # the pool of the others is gone with them


def test_the_driver_gets_what_torch_keeps_only_where_it_is_short(double: FakeTorch) -> None:
    """To empty the cache lets later steps take their memory anew."""
    graphs = CudaGraphs(DEVICE)
    graphs.capture(double.compute)
    assert "empty the cache" not in double.calls
    double.free_bytes = 1 << 20
    graphs.capture(double.compute)
    assert "empty the cache" in double.calls


@pytest.mark.parametrize("is_computed", [False, True])
def test_a_failed_capture_is_left(double: FakeTorch, is_computed: bool) -> None:
    """Whatever went wrong: the stream captures no more, the allocator knows it, and the first error is told."""
    double.fails_to_end = True

    def compute() -> None:
        if not is_computed:
            raise ValueError("not capturable")

    with pytest.raises(RuntimeError if is_computed else ValueError):
        CudaGraphs(DEVICE).capture(compute)
    assert double.calls[1:] == ["end"] * (1 + is_computed) + ["no more allocations to (0, 0)"]
    assert double.stream.name == "default"
