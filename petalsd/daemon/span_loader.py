"""Gets the weights of a span into memory: block by block fetch and load, keep what is there already."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import structlog

from petalsd.daemon.backoff import Backoff, retry
from petalsd.daemon.detached import Abandoned, AbandonSwitch, run_detached
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import WeightsError
from petalsd.log import error_fields
from petalsd.metrics import Metrics
from petalsd.models.contract import Block
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_T = TypeVar("_T")

LOAD_BACKOFF = Backoff(attempts=5, first_delay_s=2.0, max_delay_s=60.0)
_PROGRESS_PERIOD_S = 2.0
# A part is handed on when loading it took that long, and that many times what handing on the one before did.
PART_S, PART_SHARE = 5.0, 4.0


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

# Awaited with the blocks that are loaded so far, while others are still missing.
PartSink = Callable[[BlockSpan], Awaitable[None]]


class WeightsReader(Protocol):
    """What the loader needs of a model; blocking, called on the loading thread. All raise WeightsError."""

    def keep_only(self, blocks: Sequence[int]) -> None:
        """What is on the disk of other blocks may go when room is needed there."""

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

    async def load(self, blocks: BlockSpan | Sequence[int], on_part: PartSink | None = None) -> None:
        """Have all of ``blocks``, beside those that there are. WeightsError after the last attempt.

        Blocks that were loaded before a failure stay for the next attempt. ``on_part`` is told every few seconds
        what has come: all beginnings of ``blocks`` must be consecutive then.
        """
        order, progress = list(blocks), self._start_progress()
        kept, num_there, seconds = sum(index in self.blocks for index in order), 0, 0.0
        part_s = math.inf if on_part is None else PART_S
        while num_there < len(order):
            started_s = time.monotonic()
            num_there = await self._persist(order, partial(self._load_some, order, part_s, progress))
            loaded_s = time.monotonic()
            seconds += loaded_s - started_s
            if on_part is not None and num_there < len(order):
                await on_part(_hull(order[:num_there]))
                part_s = max(PART_S, PART_SHARE * (time.monotonic() - loaded_s))
        if kept < len(order):
            self.seconds_per_block = seconds / (len(order) - kept)
            self._seconds.observe(seconds)
        log.info("span_loaded", span=str(_hull(order)), kept_blocks=kept, seconds=round(seconds, 2))

    async def fetch_first(self, order: Sequence[int]) -> None:
        """Bring to the disk what ``load`` will read first. WeightsError after the last attempt."""
        progress = self._start_progress()
        await self._persist(order, partial(self._fetch_first, order, progress))

    async def _persist(self, order: Sequence[int], work: Callable[[AbandonSwitch], _T]) -> _T:
        result = await retry(
            lambda: run_detached(work, "petalsd-loader"),
            self._backoff,
            (WeightsError, OSError),
            partial(self._on_failure, _hull(order)),
        )
        self._board.clear("load_failed")
        return result

    def _on_failure(self, span: BlockSpan, error: Exception, delay_s: float) -> None:
        log.warning("load_failed", span=str(span), retry_s=delay_s, **error_fields(error))
        self._board.blame("load_failed", error)
        self._failures.inc()

    def drop_outside(self, span: BlockSpan | None) -> None:
        """Give up the blocks outside ``span``; their memory is free once nobody else holds them."""
        self.blocks = {index: block for index, block in self.blocks.items() if span and index in span}

    def _load_some(
        self, order: Sequence[int], enough_s: float, progress: ProgressSink, switch: AbandonSwitch
    ) -> int:
        """On the loading thread: load for that long, one block at least; how many of ``order`` are there then.

        Also when a later block fails: what has come is served while that one is tried again.
        """
        end_s, is_new = time.monotonic() + enough_s, False
        self._reader.keep_only(order)
        for number, index in enumerate(order):
            if index in self.blocks:
                continue
            if is_new and time.monotonic() >= end_s:
                return number
            switch.check()
            try:
                self._fetch(index, progress, switch)
                progress(LoadProgress("load", f"block {index}", number, len(order)))
                self.blocks[index] = self._reader.load_block(index)
            except Exception as error:
                if not is_new or isinstance(error, Abandoned):
                    raise
                log.warning("load_interrupted", block=index, **error_fields(error))
                return number
            is_new = True
        return len(order)

    def _fetch_first(self, order: Sequence[int], progress: ProgressSink, switch: AbandonSwitch) -> None:
        """On the loading thread."""
        self._reader.keep_only(order)
        missing = next((index for index in order if index not in self.blocks), None)
        if missing is not None:
            self._fetch(missing, progress, switch)

    def _fetch(self, index: int, progress: ProgressSink, switch: AbandonSwitch) -> None:
        """On the loading thread."""

        def fetching(file: str, done_bytes: int, total_bytes: int) -> None:
            switch.check()
            progress(LoadProgress("fetch", file, done_bytes, total_bytes))

        self._reader.fetch(BlockSpan(index, index + 1), fetching)


def _hull(blocks: Sequence[int]) -> BlockSpan:
    return BlockSpan(min(blocks), max(blocks) + 1)


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
