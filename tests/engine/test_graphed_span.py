"""Captured decode steps on the CPU: Triton's interpreter computes, ``recorded_graphs`` stands for CUDA's.

What this cannot show is said there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from petalsd.engine.captures import Captures, Capturing
from petalsd.engine.step_memory import GraphLimits, StepMemory
from petalsd.models.kernel_span import KernelSpan
from petalsd.ops.decode_batch import DECODE_BUCKETS, bucket_of
from petalsd.ops.launching import Launch
from petalsd.types import BlockSpan
from tests.engine.graph_scene import LIMITS, SINGLES, WHOLE, Counter, Scene
from tests.engine.recorded_graphs import (
    ForgottenGraphs,
    LaunchedGraphs,
    RecordedGraph,
    RecordedGraphs,
    recording,
)
from tests.models.kernel_blocks import NUM_SMS, kernel_span
from tests.models.test_block import Case
from tests.numeric import assert_close

STARTS = [20, 3, 0]


class FusedScene(Scene):
    """Of two fused blocks."""

    def __init__(self, case: Case, starts: list[int]) -> None:
        super().__init__(kernel_span(case.blocks[: len(WHOLE)]), starts)


class Captured(FusedScene):
    """With its steps captured."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, STARTS)
        self.counter, self.graphs = Counter(), RecordedGraphs()
        self.graphed = self.capture(self.graphs, self.counter)
        assert self.told == [None]

    @property
    def memory(self) -> StepMemory:
        assert self.graphed.captures.memory is not None
        return self.graphed.captures.memory


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("model"), "llama", {"num_hidden_layers": 2})


@pytest.fixture(scope="module")
def captured(case: Case) -> Captured:
    return Captured(case)


@given(st.integers(1, 80))
def test_a_bucket_is_the_smallest_that_holds_the_rows(rows: int) -> None:
    """And there is none above the largest."""
    bucket = bucket_of(rows)
    if bucket is None:
        assert rows > DECODE_BUCKETS[-1]
    else:
        assert bucket in DECODE_BUCKETS and bucket >= rows
        assert all(smaller < rows for smaller in DECODE_BUCKETS if smaller < bucket)


@pytest.mark.parametrize(("rows", "largest"), [(1, 1), (5, 8), (64, 64), (256, 64)])
def test_graphs_are_captured_for_no_more_rows_than_there_can_be(rows: int, largest: int) -> None:
    assert GraphLimits(rows, 16, 256).buckets[-1] == largest


def test_there_is_a_graph_for_each_block_and_bucket_and_one_for_the_whole(captured: Captured) -> None:
    """The largest bucket is captured first."""
    assert captured.graphed.captures.num_graphs == len(captured.graphs.graphs) == 3 * (len(WHOLE) + 1)
    rows = [graph.launches[0].grid[0] for graph in captured.graphs.graphs]
    assert rows == sorted(rows, reverse=True) and set(rows) == {1, 2, 4}


@pytest.mark.parametrize("runs", [[WHOLE], SINGLES], ids=["one graph", "a chain"])
def test_a_replay_by_the_double_equals_the_step_bit_for_bit(
    captured: Captured, runs: list[BlockSpan]
) -> None:
    """With NaN in pages that nobody wrote, in padding rows and in whatever is between the launches."""
    plain = captured.step(captured.span)
    expected = captured.step(captured.capture(LaunchedGraphs()))
    pages = [slab.clone() for slab in captured.pool.kv.slabs]
    assert_close(expected, plain, 1e-5, 1e-5, "the step beside padding rows")
    captured.counter.runs = {True: 0, False: 0}
    with torch.inference_mode():
        for field in fields(captured.memory.states):
            getattr(captured.memory.states, field.name).fill_(torch.nan)
        captured.memory.integers.fill_(2**31 - 1)
    assert torch.equal(captured.step(captured.graphed, runs), expected)
    for slab, page in zip(captured.pool.kv.slabs, pages, strict=True):
        assert torch.equal(slab.nan_to_num(), page.nan_to_num())
    assert captured.counter.runs == {True: len(runs), False: 0}


def test_static_memory_stays_where_it_is_and_answers_are_not_in_it(captured: Captured) -> None:
    """A later step must not change the answer of an earlier one."""

    def addresses() -> list[int]:
        states = captured.memory.states
        return [captured.memory.integers.data_ptr(), states.residual.data_ptr(), states.delta.data_ptr()]

    before, first = addresses(), captured.step(captured.graphed)
    kept = first.clone()
    second = captured.step(captured.graphed, SINGLES[:1])
    assert addresses() == before
    assert torch.equal(first, kept) and not torch.equal(first, second)


def test_launches_of_a_bucket_depend_on_no_length(captured: Captured) -> None:
    """Grids, constants and addresses are those of the capture, whichever rows there are; ten a block at most."""
    launched = []
    for is_padding in (False, True):
        captured.step(captured.graphed)  # leaves its rows in the static memory
        if is_padding:
            with torch.inference_mode():
                captured.memory.pad(4)
        states, rows = captured.memory.states.first(4), captured.memory.rows(4)
        with torch.inference_mode(), recording() as tape:
            captured.span.compute(SINGLES[0], states, rows, captured.pool.kv, captured.memory.plans[4])
        assert RecordedGraph(tape).num_kernels <= 10
        launched.append([_described(launch) for launch in RecordedGraph(tape).launches])
    assert launched[0] == launched[1]
    assert launched[0] == [_described(launch) for launch in captured.graphs.graphs[0].launches]


def _described(launch: Launch) -> tuple[object, ...]:
    addresses = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in launch.arguments]
    return launch.kernel.__name__, launch.grid, dict(launch.constants), addresses


def test_steps_that_were_not_captured_are_computed_all_the_same(case: Case, captured: Captured) -> None:
    """Five rows are above the largest bucket; other pages are not those of the graphs."""
    scene = FusedScene(case, [1, 2, 3, 4, 5])
    captured.counter.runs = {True: 0, False: 0}
    assert torch.equal(scene.step(captured.graphed), scene.step(captured.span))
    scene.items = scene.items[:1]
    assert torch.equal(scene.step(captured.graphed), scene.step(captured.span))
    assert captured.counter.runs == {True: 0, False: 2}


@pytest.mark.parametrize("fail_at", [0, 1])
def test_after_a_failed_capture_the_rest_is_launched(case: Case, fail_at: int) -> None:
    """The reason is kept and told; what was captured before is replayed; the answers are the same."""
    scene, counter = FusedScene(case, STARTS), Counter()
    with capture_logs():  # to print the tapes would take long
        graphed = scene.capture(RecordedGraphs(fail_at), counter)
    captures, reason = graphed.captures, "RuntimeError: operation not permitted when stream is capturing"
    assert captures.failure == reason and scene.told == [reason]
    assert captures.are_complete and captures.num_graphs == fail_at < captures.num_wanted
    assert (captures.nbytes > 0) is (captures.memory is not None) is (fail_at > 0)
    assert_close(scene.step(graphed), scene.step(scene.span), 1e-5, 1e-5, "partly replayed")
    assert counter.runs == {True: fail_at, False: 1}


def test_graphs_of_blocks_that_are_left_go_little_by_little(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of blocks that stay are the same ones, and what was left is no more held by anything."""
    monkeypatch.setattr("petalsd.engine.captures._GIVEN_UP_AT_ONCE", 4)
    scene, graphs = FusedScene(case, STARTS), ForgottenGraphs()
    before = scene.capture(graphs).captures
    kept = KernelSpan({1: scene.span.source(1)}, NUM_SMS)
    captures = Captures([kept], scene.pool.kv, LIMITS, Capturing(graphs), scene.told.append)
    captures.take_over(before)
    del before
    assert captures.num_graphs == captures.num_wanted == 3 and scene.told == [None, None]
    alive = [graphs.num_alive]
    while not captures.are_complete:
        captures.capture_next()
        alive.append(graphs.num_alive)
    assert alive == [9, 5, 3] and len(graphs.captured) == 9


def test_captures_leave_memory_free(case: Case, captured: Captured) -> None:
    """They end before they take what is to be left, and so is no worse than without."""
    scene = FusedScene(case, STARTS)
    first = captured.graphed.captures.steps[0, 1, 4].nbytes
    graphs = RecordedGraphs(memory_bytes=100 + 2 * first)
    capturing = Capturing(graphs, spare_bytes=100)
    captures = Captures([scene.span], scene.pool.kv, LIMITS, capturing, scene.told.append)
    with capture_logs():
        captures.capture_all()
    assert captures.num_graphs == 2 and graphs.free_bytes() >= 100
    assert captures.failure is not None and captures.failure.startswith("MemoryError: 0 MiB of the device")


def test_all_that_captures_take_counts_as_theirs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that graphs work in, too, with tables of angles and room for parts of contexts."""
    graphs = RecordedGraphs()

    class Costly(StepMemory):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            graphs.memory_bytes -= 5000

    monkeypatch.setattr("petalsd.engine.captures.StepMemory", Costly)
    scene, before = FusedScene(case, STARTS), graphs.free_bytes()
    captures = scene.capture(graphs).captures
    assert captures.nbytes == before - graphs.free_bytes() > 5000
    following = Captures([scene.span], scene.pool.kv, LIMITS, Capturing(graphs), scene.told.append)
    following.take_over(captures)
    assert following.nbytes == captures.nbytes


def test_captures_wait_for_memory_that_others_give_back(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a move the old blocks are there for a while; but not for ever."""
    scene, graphs = FusedScene(case, STARTS), RecordedGraphs(memory_bytes=0)
    capturing = Capturing(graphs, spare_bytes=100)
    captures = Captures([scene.span], scene.pool.kv, LIMITS, capturing, scene.told.append)
    captures.capture_next()
    assert captures.must_wait and not captures.are_complete
    graphs.memory_bytes = 10_000
    captures.capture_next()
    assert captures.num_graphs == 1 and not captures.must_wait
    graphs.memory_bytes = 0
    monkeypatch.setattr("petalsd.engine.captures._PATIENCE_S", 0.0)
    with capture_logs():
        captures.capture_next()
    assert captures.are_complete and len(scene.told) == 1 and captures.failure is not None


def test_nothing_is_captured_while_somebody_else_has_the_turn(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions do not wait for that, and a start not for ever."""
    scene = FusedScene(case, STARTS)
    capturing = Capturing(RecordedGraphs())
    captures = Captures([scene.span], scene.pool.kv, LIMITS, capturing, scene.told.append)
    with capturing.turn:
        captures.capture_next()
        assert captures.must_wait and captures.num_graphs == 0 and not captures.are_complete
    captures.capture_next()
    assert captures.num_graphs == 1 and not captures.must_wait
    monkeypatch.setattr("petalsd.engine.captures._PATIENCE_S", 0.0)
    with capturing.turn, capture_logs():
        captures.capture_all()
    assert captures.num_graphs == 1 and scene.told == [captures.failure] != [None]


def _read_a_value(x: torch.Tensor) -> None:
    x.mul_(x.sum().item())


def _shape_by_values(x: torch.Tensor) -> None:
    x.nonzero()


def _tensor_of_the_host(x: torch.Tensor) -> None:
    x.add_(torch.tensor([1.0]))


@pytest.mark.parametrize("compute", [_read_a_value, _shape_by_values, _tensor_of_the_host])
def test_the_double_refuses_what_a_graph_cannot_hold(compute: Callable[[torch.Tensor], None]) -> None:
    x = torch.randn(4)
    with pytest.raises(RuntimeError, match="not capturable"):
        RecordedGraphs().capture(lambda: compute(x))


def test_the_double_shows_an_input_that_was_not_copied() -> None:
    """A replay computes on what lies in the captured memory, not on what a caller holds."""
    x, out = torch.ones(2), torch.empty(2)

    def double() -> None:
        torch.mul(x, 2, out=out)

    graph = RecordedGraphs().capture(double)
    graph.replay()
    assert out.tolist() == [2, 2]
    x.copy_(torch.full((2,), 3.0))
    graph.replay()
    assert out.tolist() == [6, 6]
