"""A whole run with a clock that measures nothing: rows, files, picture, table, and what is said without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import block_cases, others, suite
from benchmarks.gpu.block_cases import Model, check_parity
from benchmarks.gpu.cards import SHAPES, Card
from benchmarks.gpu.case import ERROR
from benchmarks.gpu.outcome import accept, conclude, slug, summary
from benchmarks.gpu.peaks import measure_peaks
from benchmarks.gpu.roofline import Step, block_launches, limit_s, predict_s
from benchmarks.gpu.small_cases import norm
from benchmarks.gpu.suite import Bench
from benchmarks.gpu.verdict import LAUNCHES, SPAN_STEP, STEP
from benchmarks.report import OURS, TRANSFORMERS, Row
from benchmarks.timing import Work, summarize
from petalsd.types import BlockSpan
from tests.benchmarks.gpu.doubles import SITE, TINY, AddingSpan, FakeClock, adding_step

MACHINE = {"date": "2026-01-01T00:00:00Z", "commit": "abc", "gpu": "a card"}
CARD = Card("A Card 24GB", 1000, 100, 100)


class Replay:
    """A graph that computes again in the memory that it was captured with; a broken one does nothing."""

    def __init__(self, work: Work, is_broken: bool) -> None:
        self._work = work
        self._is_broken = is_broken

    def replay(self) -> None:
        if not self._is_broken:
            self._work()


def capturing(*, is_broken: bool = False) -> Callable[[Work], Replay]:
    return lambda work: Replay(work, is_broken)


def bench() -> Bench:
    return Bench(SITE, FakeClock(), capturing())


def test_replays_must_give_what_launches_give() -> None:
    """Of the whole span, and block by block; a graph that does nothing is found."""
    span = AddingSpan(BlockSpan(0, 3))
    good = check_parity(adding_step(span, 2), {"rows": 2}, capturing())
    assert (good.metric, good.spread.median, good.setting["tolerance"]) == (ERROR, 0.0, "0")
    assert span.computed == [BlockSpan(0, 3)] * 2 + [BlockSpan(index, index + 1) for index in range(3)]
    broken = check_parity(adding_step(span, 2), {"rows": 2}, capturing(is_broken=True))
    assert broken.spread.median > 0


def test_rows_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches and both modes of a block at each batch, then the steps of a span and the parity of its replays."""
    monkeypatch.setattr(suite, "BATCHES", (1, 2))
    monkeypatch.setattr(suite, "_SPAN_BATCHES", (2,))
    monkeypatch.setattr(suite, "SPAN_BLOCKS", 3)
    spans = []

    def step(site: object, model: Model, rows: int, context: int) -> block_cases.DecodeStep:
        spans.append(AddingSpan(BlockSpan(0, len(model.blocks))))
        return adding_step(spans[-1], rows)

    monkeypatch.setattr(block_cases, "make_step", step)
    rows = list(suite.block_rows(replace(bench(), site=replace(SITE, dtype=torch.float32)), TINY, "bfloat16"))
    assert [row.metric for row in rows] == [
        LAUNCHES, STEP, STEP, LAUNCHES, STEP, STEP, SPAN_STEP, ERROR,
    ]  # fmt: skip
    assert [len(span.span) for span in spans] == [1, 1, 3]
    assert rows[0].spread.median == 10
    assert [row.setting["mode"] for row in rows[1:3]] == ["launched", "replayed"]


def test_rivals_that_are_not_there_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' layer runs wherever torch does; without Petals' environment that is written down."""
    monkeypatch.setattr(suite, "BATCHES", (2,))
    monkeypatch.setattr(others.stock, "is_built", lambda: False)
    running = bench()
    rows = list(suite.rival_rows(running, TINY))
    assert [(row.provider, row.setting["mode"]) for row in rows] == [
        (TRANSFORMERS, "launched"), (TRANSFORMERS, "replayed"),
    ]  # fmt: skip
    (skipped,) = running.skipped
    assert "stock Petals' environment is not there" in skipped


def test_peaks_are_bytes_and_products_over_time() -> None:
    peaks = measure_peaks(SITE, FakeClock(), copy_bytes=1000, size=10)
    assert peaks.gb_per_s == pytest.approx(2 * 1000 / 1e-6 / 1e9)
    assert peaks.tflops == pytest.approx(2 * 10**3 / 3e-6 / 1e12)


def step_row(provider: str, median: float) -> Row:
    setting = {"model": SHAPES[0].name, "weights": "bfloat16", "rows": 1, "context": 4096, "mode": "replayed"}
    return Row(provider, setting, STEP, "us", summarize([median] * 5))


def test_files_table_and_gate(tmp_path: Path) -> None:
    """A run is written, drawn and accepted; a slower one afterwards is named, in the table too."""
    torch.manual_seed(0)
    accepted = tmp_path / "accepted"
    kernels = list(suite.kernel_rows(bench(), [norm(SITE, TINY, 2)]))
    good = conclude(
        CARD,
        [*kernels, step_row(OURS, 600), step_row(TRANSFORMERS, 900)],
        MACHINE,
        bench(),
        tmp_path,
        accepted,
    )
    assert good.complaints == []
    assert {file.name for file in tmp_path.iterdir()} == {
        f"a-card-24gb.{end}" for end in ("csv", "json", "svg")
    }
    assert "A block of Llama-3.1-8B" in (tmp_path / "a-card-24gb.svg").read_text()
    assert json.loads(accept(good, tmp_path, accepted).read_text())["machine"] == MACHINE
    slow = conclude(CARD, [*kernels, step_row(OURS, 660)], MACHINE, bench(), tmp_path, accepted)
    (complaint,) = slow.complaints
    assert complaint.startswith("worse: block step")
    table = summary(slow)
    assert f"* **{complaint}**" in table
    launches = block_launches(SHAPES[0], Step(1), CARD)
    predicted, limit = predict_s(launches, CARD) * 1e6, limit_s(launches, CARD, 0.6) * 1e6
    assert f"| petalsd | 660 | {predicted:.0f} | {limit:.0f} |" in table
    assert "kernel=add_norm rows=2 | petalsd" in table


def test_wrong_values_are_never_accepted(tmp_path: Path) -> None:
    wrong = Row(OURS, {"kernel": "x", "tolerance": "0.001"}, ERROR, "x", summarize([0.5]))
    outcome = conclude(CARD, [wrong], MACHINE, bench(), tmp_path, tmp_path / "accepted")
    with pytest.raises(ValueError, match="not accepted: wrong values"):
        accept(outcome, tmp_path, tmp_path / "accepted")


def test_a_part_of_a_run_is_never_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """It would take the place of the whole one, and nothing of the rest could get worse any more."""
    with pytest.raises(SystemExit, match="2"):
        program.main(["--only", "kernels", "--accept"])
    assert "--accept is for whole runs" in capsys.readouterr().err


def test_a_card_names_its_file() -> None:
    assert slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, and a status of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main([]) == 3
    assert (
        capsys.readouterr().out
        == f"There is no GPU to measure: torch {torch.__version__} sees no CUDA device.\n"
    )
