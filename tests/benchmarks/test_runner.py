"""The suite as a whole: one broken benchmark costs only itself, time is bounded, and what is missing is named."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from benchmarks import runner
from benchmarks.__main__ import main, parse_arguments
from benchmarks.benchmark import Benchmark, Options
from benchmarks.registry import SUITE, find_benchmarks
from benchmarks.report import RESULTS, Row
from benchmarks.runner import SuiteOptions, run_suite
from benchmarks.timing import summarize


def one_row(options: Options) -> list[Row]:
    return [Row("petalsd", {"threads": options.threads}, "step", "ms", summarize([1.0]))]


def in_time_only(options: Options) -> list[Row]:
    assert not options.has_time("the long one", needed_s=1000.0)
    return one_row(options)


def broken(options: Options) -> list[Row]:
    raise RuntimeError("no such kernel")


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SuiteOptions:
    """Two made-up benchmarks in the place of the real ones."""
    made_up = [Benchmark("a_broken", "", broken, 1.0), Benchmark("b_good", "", in_time_only, 1.0)]
    monkeypatch.setattr(runner, "find_benchmarks", lambda: {each.name: each for each in made_up})
    return SuiteOptions(tmp_path / "model", tmp_path / "results", smoke=True)


def test_a_broken_benchmark_costs_only_itself(
    suite: SuiteOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named at the end with its traceback before; the others are measured and written."""
    assert run_suite(suite, ["a_broken", "b_good"]) == ["a_broken"]
    assert [path.name for path in sorted(suite.results.iterdir())] == ["b_good.csv", "b_good.json"]
    assert "no such kernel" in capsys.readouterr().err


def test_what_was_left_out_is_in_the_results(suite: SuiteOptions) -> None:
    """A setting that there was no time for is named under ``skipped``."""
    run_suite(suite, ["b_good"])
    document = json.loads((suite.results / "b_good.json").read_text())
    assert document["skipped"] == ["the long one: no time left"]


def test_nothing_is_begun_when_the_time_is_up(
    suite: SuiteOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "LIMIT_S", 0.0)
    assert run_suite(suite, ["a_broken"]) == []
    assert "no time left" in capsys.readouterr().err


def test_every_file_of_the_suite_is_a_benchmark() -> None:
    """Found by its name, within the time of the whole suite."""
    found = find_benchmarks()
    assert sorted(found) == sorted(path.stem for path in SUITE.glob("*.py"))
    assert sum(benchmark.budget_s for benchmark in found.values()) <= runner.LIMIT_S


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line says what to do, and measures nothing."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--model", "/nonexistent"])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit, match="no model in /nonexistent: run make demo-model"):
        main()


@pytest.mark.parametrize(
    ("words", "directory"),
    [
        (["--smoke"], Path("build/bench-smoke")),
        ([], RESULTS),
        (["--smoke", "--results", "elsewhere"], Path("elsewhere")),
    ],
)
def test_what_measures_nothing_replaces_no_results(
    words: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of a smoke run go elsewhere."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    assert parse_arguments().results == directory
