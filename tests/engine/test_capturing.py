"""Captures beside sessions, on the CPU as in ``test_graphed_span``: blocks that come, go and stay meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
from structlog.testing import capture_logs

from petalsd.daemon.warnings import WarningBoard
from petalsd.engine.captures import Capturing
from petalsd.engine.engine import Engine
from petalsd.engine.limits import EngineLimits
from petalsd.types import BlockSpan
from tests.engine.kernel_rig import Counter, KernelRunners, serving
from tests.engine.recorded_graphs import RecordedGraph, RecordedGraphs
from tests.engine.rig import CPU, TinyModel, feed, opened, states
from tests.numeric import assert_close
from tests.waiting import eventually

LIMITS = EngineLimits(max_batch_tokens=16, prefill_chunk_tokens=4, max_sessions=2, max_session_tokens=64)
OLD, NEW, KEPT = BlockSpan(0, 2), BlockSpan(1, 3), BlockSpan(1, 2)
NUM_GRAPHS = 2 * 3
"""Of two blocks, and of both at once, for two sizes of batches."""


class Journal(RecordedGraphs):
    """Captures and batches in the order in which they were made."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__(fail_at)
        self.events: list[str] = []

    def capture(self, compute: Callable[[], None]) -> RecordedGraph:
        self.events.append("capture")
        return super().capture(compute)


class Observer(Counter):
    """Notes batches where they are computed, in the engine's thread, and ends the test's turn with the first."""

    def __init__(self, journal: Journal, capturing: Capturing) -> None:
        super().__init__()
        self._journal, self._capturing = journal, capturing
        self.must_release = False

    def span_computed(self, *, is_replayed: bool) -> None:
        super().span_computed(is_replayed=is_replayed)
        self._journal.events.append("batch")
        if self.must_release:
            self._capturing.turn.release()
            self.must_release = False


class Stage:
    """An engine over ``OLD`` with everything captured; ``told`` is what was said of captures."""

    def __init__(self, llama: TinyModel, graphs: Journal) -> None:
        self.llama, self.graphs = llama, graphs
        self.capturing = Capturing(graphs)
        self.observer = Observer(graphs, self.capturing)
        self.told: list[str | None] = []
        self.engine: Engine

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Engine]:
        runners = KernelRunners(CPU, 1, LIMITS, self.observer, self.capturing, self.told.append)
        async with serving(self.llama, self.observer, runners=runners, span=OLD) as self.engine:
            yield self.engine

    async def change(self, span: BlockSpan) -> None:
        await self.engine.change_span({index: self.llama.blocks[index] for index in span})

    @property
    def counts(self) -> tuple[int, int]:
        stats = self.engine.stats()
        return stats.graphs, stats.graphs_wanted

    async def until_settled(self, times: int) -> None:
        await eventually(lambda: len(self.told) == times)

    def steps(self) -> list[tuple[int, int, int]]:
        """The keys of what is captured, the latest last."""
        assert self.engine._core is not None and self.engine._core.captures is not None
        return list(self.engine._core.captures.steps)


async def test_new_blocks_are_captured_one_by_one_between_the_steps_of_sessions(llama: TinyModel) -> None:
    """Blocks that stay keep their graphs. The answers are those of transformers before, meanwhile and after."""
    stage = Stage(llama, Journal())
    hidden, other = states(1, 9), states(1, 38, seed=1)
    async with stage.serving() as engine, opened(engine, KEPT) as staying:
        assert stage.told == [None] and stage.counts == (NUM_GRAPHS, NUM_GRAPHS)
        kept = [await feed(staying, hidden[:, :4], [3, 1])]
        stage.capturing.turn.acquire()
        await stage.change(NEW)
        assert stage.counts == (2, NUM_GRAPHS) and stage.told == [None]
        stage.observer.runs = {True: 0, False: 0}
        kept.append(await feed(staying, hidden[:, 4:5], [1]))
        assert stage.observer.runs == {True: 1, False: 0}
        async with opened(engine, NEW) as coming:
            new = [await feed(coming, other[:, :2], [1, 1])]
            assert stage.observer.runs == {True: 3, False: 2}  # half of each step was replayed
            stage.graphs.events.clear()
            stage.observer.must_release = True
            new.append(await feed(coming, other[:, 2:37], [35]))
            await stage.until_settled(2)
            during = stage.graphs.events[: 1 + _last(stage.graphs.events, "batch")]
            stage.observer.runs = {True: 0, False: 0}
            new.append(await feed(coming, other[:, 37:], [1]))
            kept.append(await feed(staying, hidden[:, 5:], [1] * 4))
            assert stage.observer.runs == {True: 5, False: 0}
        captured = stage.steps()
    # How many batches the prompt takes depends on how fast they are.
    assert during.count("capture") >= 2 and "capture capture" not in " ".join(during)
    assert captured == [(1, 2, 2), (1, 2, 1), (2, 3, 2), (1, 3, 2), (2, 3, 1), (1, 3, 1)]
    assert_close(torch.cat(kept, 1), llama.expected(hidden, KEPT).detach(), 1e-4, 1e-4, "blocks that stay")
    assert_close(torch.cat(new, 1), llama.expected(other, NEW).detach(), 1e-4, 1e-4, "new blocks")


def _last(events: list[str], event: str) -> int:
    return max(index for index, one in enumerate(events) if one == event)


async def test_what_fails_beside_sessions_is_launched_and_told(llama: TinyModel) -> None:
    """What was captured before stays; so do the sessions."""
    stage, hidden, board = Stage(llama, Journal(fail_at=NUM_GRAPHS + 1)), states(1, 4), WarningBoard()
    async with stage.serving() as engine:
        with capture_logs() as logs:
            await stage.change(NEW)
            await stage.until_settled(2)
        assert [entry["event"] for entry in logs] == ["graph_capture_failed"]
        assert stage.counts == (2 + 1, NUM_GRAPHS)
        assert stage.told == [None, "RuntimeError: operation not permitted when stream is capturing"]
        assert engine.stats().graphs_failure == stage.told[1]
        for failure in stage.told:
            board.note("graphs_failed", failure)
        assert [warning.detail for warning in board.active()] == [stage.told[1]]
        async with opened(engine, NEW) as session:
            answer = await feed(session, hidden, [3, 1])
    assert_close(answer, llama.expected(hidden, NEW).detach(), 1e-4, 1e-4, "after the failure")


async def test_another_move_drops_what_was_left_to_capture(llama: TinyModel) -> None:
    """Back to the old blocks: that of them which stayed has its graphs still, and no new one comes any more."""
    stage, hidden = Stage(llama, Journal()), states(1, 5)
    async with stage.serving() as engine, opened(engine, KEPT) as session:
        answers = [await feed(session, hidden[:, :3], [2, 1])]
        stage.capturing.turn.acquire()
        await stage.change(NEW)
        await stage.change(OLD)
        assert stage.counts == (2, NUM_GRAPHS) and len(stage.graphs.graphs) == NUM_GRAPHS
        answers.append(await feed(session, hidden[:, 3:4], [1]))
        stage.capturing.turn.release()
        await stage.until_settled(2)
        assert stage.counts == (NUM_GRAPHS, NUM_GRAPHS)
        captured = stage.steps()
        answers.append(await feed(session, hidden[:, 4:], [1]))
    assert {(start, end) for start, end, _ in captured} == {(0, 1), (1, 2), (0, 2)}
    assert len(stage.graphs.graphs) == NUM_GRAPHS + 4
    assert_close(torch.cat(answers, 1), llama.expected(hidden, KEPT).detach(), 1e-4, 1e-4, "both moves")


async def test_the_engine_stops_with_captures_pending(llama: TinyModel) -> None:
    """At once, whether somebody else has the turn or not; nothing is captured after that."""
    stage = Stage(llama, Journal())
    async with stage.serving() as engine:
        stage.capturing.turn.acquire()
        await stage.change(NEW)
        thread = engine._thread
        assert thread is not None
        await engine.stop(deadline_s=10)
        assert not thread._thread.is_alive()
        stage.capturing.turn.release()
        assert len(stage.graphs.graphs) == NUM_GRAPHS and stage.told == [None]
        await engine.start()  # for the end of the stage
