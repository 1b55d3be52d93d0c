"""Gets the weights of a span into memory: fetch the files, load block by block, keep what is there already."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog

from petalsd.daemon.backoff import Backoff, retry
from petalsd.daemon.detached import AbandonSwitch, run_detached
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import WeightsError
from petalsd.log import error_fields
from petalsd.metrics import Metrics
from petalsd.models.contract import Block
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

LOAD_BACKOFF = Backoff(attempts=5, first_delay_s=2.0, max_delay_s=60.0)
_PROGRESS_PERIOD_S = 2.0


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Where a load is: ``stage`` is "fetch" (units are bytes of ``item``, a file) or "load" (units are blocks)."""

    stage: str
    item: str
    done: int
    total: int

    @property
    def percent(self) -> int:
        return 100 * self.done // self.total if self.total else 100


ProgressSink = Callable[[LoadProgress], None]


class WeightsReader(Protocol):
    """What the loader needs of a model; blocking, called on the loading thread. Both raise WeightsError."""

    def fetch(self, span: BlockSpan, progress: Callable[[str, int, int], None]) -> None:
        """Bring the files that hold ``span`` to the disk; ``progress(file, done_bytes, total_bytes)``."""

    def load_block(self, index: int) -> Block:
        """Read one block from the disk to the device."""


class SpanLoader:
    """Owns the loaded blocks; those in both the old and the new span are never loaded twice.

    ``start_progress`` is called at the beginning of each load for what that load reports to.
    """

    def __init__(
        self,
        reader: WeightsReader,
        start_progress: Callable[[], ProgressSink],
        board: WarningBoard,
        metrics: Metrics,
        backoff: Backoff = LOAD_BACKOFF,
    ) -> None:
        self._reader = reader
        self._start_progress = start_progress
        self._board = board
        self._seconds = metrics.histogram("load_seconds")
        self._failures = metrics.counter("load_failures_total")
        self._backoff = backoff
        self.blocks: dict[int, Block] = {}
        self.seconds_per_block: float | None = None  # of the last load that read any, fetching included

    async def load(self, span: BlockSpan) -> dict[int, Block]:
        """All blocks of ``span``, beside those that there are. WeightsError after the last attempt.

        Blocks that were loaded before a failure stay for the next attempt.
        """
        started_s = time.monotonic()
        kept, progress = sum(index in self.blocks for index in span), self._start_progress()
        await self._persist(span, lambda switch: self._load_missing(span, switch, progress))
        seconds = time.monotonic() - started_s
        if kept < len(span):
            self.seconds_per_block = seconds / (len(span) - kept)
            self._seconds.observe(seconds)
        log.info("span_loaded", span=str(span), kept_blocks=kept, seconds=round(seconds, 2))
        return {index: self.blocks[index] for index in span}

    async def fetch(self, span: BlockSpan) -> None:
        """Bring to the disk what ``load`` will read. WeightsError after the last attempt."""
        progress = self._start_progress()
        await self._persist(span, lambda switch: self._fetch_missing(span, switch, progress))

    async def _persist(self, span: BlockSpan, work: Callable[[AbandonSwitch], object]) -> None:
        await retry(
            lambda: run_detached(work, "petalsd-loader"),
            self._backoff,
            (WeightsError, OSError),
            partial(self._on_failure, span),
        )
        self._board.clear("load_failed")

    def _on_failure(self, span: BlockSpan, error: Exception, delay_s: float) -> None:
        log.warning("load_failed", span=str(span), retry_s=delay_s, **error_fields(error))
        self._board.set("load_failed", str(error))
        self._failures.inc()

    def drop_outside(self, span: BlockSpan | None) -> None:
        """Give up the blocks outside ``span``; their memory is free once nobody else holds them."""
        self.blocks = {index: block for index, block in self.blocks.items() if span and index in span}

    def _load_missing(self, span: BlockSpan, switch: AbandonSwitch, progress: ProgressSink) -> None:
        """On the loading thread."""
        missing = self._fetch_missing(span, switch, progress)
        for number, index in enumerate(missing):
            switch.check()
            progress(LoadProgress("load", f"block {index}", number, len(missing)))
            self.blocks[index] = self._reader.load_block(index)

    def _fetch_missing(self, span: BlockSpan, switch: AbandonSwitch, progress: ProgressSink) -> list[int]:
        """On the loading thread; the blocks that are not loaded yet."""
        missing = [index for index in span if index not in self.blocks]

        def fetching(file: str, done_bytes: int, total_bytes: int) -> None:
            switch.check()
            progress(LoadProgress("fetch", file, done_bytes, total_bytes))

        if missing:
            self._reader.fetch(BlockSpan(missing[0], missing[-1] + 1), fetching)
        return missing


def both(first: ProgressSink, second: ProgressSink) -> ProgressSink:
    """Reports to two."""

    def report(progress: LoadProgress) -> None:
        first(progress)
        second(progress)

    return report


class ProgressLog:
    """A line every two seconds: a long load is seen to move, a short one stays quiet."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s = clock()

    def __call__(self, progress: LoadProgress) -> None:
        now_s = self._clock()
        if now_s - self._last_s >= _PROGRESS_PERIOD_S:
            self._last_s = now_s
            log.info(
                "loading",
                stage=progress.stage,
                item=progress.item,
                done=progress.done,
                total=progress.total,
                percent=progress.percent,
            )
