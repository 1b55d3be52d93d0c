"""Loading spans with a reader that keeps a record instead of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from petalsd.daemon.backoff import Backoff
from petalsd.daemon.span_loader import LoadProgress, ProgressLog, SpanLoader
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import UnsupportedModel, WeightsError
from petalsd.metrics import Metrics
from petalsd.types import BlockSpan
from tests.daemon.measured import read


class RecordingReader:
    """Blocks are their names; ``failures`` are raised by load_block one after the other."""

    def __init__(self, failures: Sequence[Exception | None] = ()) -> None:
        self.failures = iter(failures)
        self.fetched: list[BlockSpan] = []
        self.loaded: list[int] = []
        self.kept: list[list[int]] = []

    def keep_only(self, blocks: Sequence[int]) -> None:
        self.kept.append(list(blocks))

    def fetch(self, span: BlockSpan, progress: Callable[[str, int, int], None]) -> None:
        self.fetched.append(span)
        progress("model.safetensors", 50, 200)

    def load_block(self, index: int) -> Any:
        failure = next(self.failures, None)
        if failure is not None:
            raise failure
        self.loaded.append(index)
        return f"block {index}"


def make_loader(
    reader: RecordingReader, attempts: int = 3, metrics: Metrics | None = None
) -> tuple[SpanLoader, list[LoadProgress]]:
    progress: list[LoadProgress] = []
    backoff = Backoff(attempts, 0.0, 0.0)
    return SpanLoader(
        reader, lambda: progress.append, WarningBoard(), metrics or Metrics(), backoff
    ), progress


async def test_blocks_in_both_spans_are_kept() -> None:
    """A move from 0:4 to 2:6 fetches and loads 4 and 5 only; 0 and 1 are there until they are given up."""
    reader = RecordingReader()
    loader, _ = make_loader(reader)
    await loader.load(BlockSpan(0, 4))
    await loader.load(BlockSpan(2, 6))
    assert reader.kept == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert reader.loaded == [0, 1, 2, 3, 4, 5]
    assert reader.fetched == [BlockSpan(index, index + 1) for index in range(6)]
    assert list(loader.blocks) == [0, 1, 2, 3, 4, 5]
    loader.drop_outside(BlockSpan(2, 6))
    assert list(loader.blocks) == [2, 3, 4, 5]


async def test_a_failed_load_is_tried_again_from_where_it_was() -> None:
    """Blocks loaded before the failure are not loaded again."""
    reader = RecordingReader([None, WeightsError("truncated"), None, OSError("disk"), None])
    loader, _ = make_loader(reader)
    await loader.load(BlockSpan(0, 3))
    assert reader.loaded == [0, 1, 2]


async def test_loads_are_measured_with_their_failures() -> None:
    """One load with two failed attempts; a span whose blocks are all there is no load."""
    metrics = Metrics()
    loader, _ = make_loader(RecordingReader([WeightsError("a"), OSError("b")]), metrics=metrics)
    await loader.load(BlockSpan(0, 3))
    await loader.load(BlockSpan(1, 3))
    series = read(metrics)
    assert series["petalsd_load_failures_total", ()] == 2
    assert series["petalsd_load_seconds_count", ()] == 1


async def test_attempts_are_bounded_and_permanent_errors_end_them() -> None:
    """The last WeightsError is raised; another error is raised at once."""
    loader, _ = make_loader(RecordingReader([WeightsError(f"try {n}") for n in (1, 2, 3)]))
    with pytest.raises(WeightsError, match="try 3"):
        await loader.load(BlockSpan(0, 1))
    loader, _ = make_loader(RecordingReader([UnsupportedModel("bits"), None]))
    with pytest.raises(UnsupportedModel):
        await loader.load(BlockSpan(0, 1))


async def test_progress_tells_files_and_blocks() -> None:
    """Fetching reports bytes of a file, loading reports blocks; each is loaded as soon as it is there."""
    loader, progress = make_loader(RecordingReader())
    await loader.load(BlockSpan(1, 3))
    assert progress == [
        LoadProgress("fetch", "model.safetensors", 50, 200),
        LoadProgress("load", "block 1", 0, 2),
        LoadProgress("fetch", "model.safetensors", 50, 200),
        LoadProgress("load", "block 2", 1, 2),
    ]
    assert [item.percent for item in progress] == [25, 0, 25, 50]


def test_progress_is_logged_every_two_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """A short load stays quiet; a long one writes a line per two seconds."""
    seconds = iter([0.0, 1.9, 2.0, 3.9, 4.0])
    progress = ProgressLog(clock=lambda: next(seconds))
    for done in range(4):
        progress(LoadProgress("load", f"block {done}", done, 4))
    lines = [line for line in capsys.readouterr().out.splitlines() if "loading" in line]
    assert ["block 1" in lines[0], "block 3" in lines[1]] == [True, True]
    assert len(lines) == 2
