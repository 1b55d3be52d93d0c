"""What the suite makes of samples: summaries, comparisons, files that a later run is held against, refusals."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.bandwidth import Bandwidth, measure_bandwidth
from benchmarks.report import Row, Run, find_reference, flatten, publish, read_results
from benchmarks.runner import BrokenBenchmark, check_rows
from benchmarks.timing import Pace, Spread, summarize, take_turns

BANDWIDTH = Bandwidth({1: 20.0, 2: 32.0}, 1 << 28)


def row(
    provider: str, median: float, unit: str = "ms", nbytes: int | None = None, **setting: int | str
) -> Row:
    return Row(provider, setting, "step", unit, summarize([median]), nbytes)


def test_a_summary_is_the_median_and_the_spread() -> None:
    """Percentiles are interpolated; one slow sample does not move the median."""
    spread = summarize([1.0, 2.0, 3.0, 4.0, 5.0, 1000.0])
    assert spread == Spread(median=3.5, p5=1.25, p20=2.0, p80=5.0, p95=751.25, count=6)
    assert summarize([2.0]) == Spread(2.0, 2.0, 2.0, 2.0, 2.0, 1)


def test_providers_take_turns() -> None:
    """Each is warmed up once, then they follow each other round by round."""
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    samples = take_turns(works, Pace(rounds=2, round_s=0.0))
    assert calls == ["a", "b"] * 3
    assert [len(seconds) for seconds in samples.values()] == [2, 2]


def test_a_ratio_is_how_many_times_better() -> None:
    """Above 1 is better, for times and for rates alike; the reference itself has none."""
    slow, fast = row("petals-2.2", 10.0), row("petalsd", 2.0)
    assert flatten("b", fast, [slow, fast], BANDWIDTH)["ratio"] == 5.0
    assert flatten("b", slow, [slow, fast], BANDWIDTH)["ratio"] is None
    few, many = row("petals-2.2", 10.0, "steps/s"), row("petalsd", 120.0, "steps/s")
    assert flatten("b", many, [few, many], BANDWIDTH)["ratio"] == 12.0


def test_the_reference_has_the_same_setting() -> None:
    """Only the format may differ, where the reference has none of this format; then its best counts."""
    same = row("transformers", 4.0, format="bfloat16", sessions=1)
    others = [row("transformers", 9.0, format="float32", sessions=1), row("transformers", 8.0, sessions=8)]
    assert find_reference(row("petalsd", 1.0, format="bfloat16", sessions=1), [*others, same]) is same
    assert find_reference(row("petalsd", 1.0, format="int8", sessions=1), [*others, same]) is same
    assert find_reference(row("petalsd", 1.0, format="int8", sessions=16), [*others, same]) is None


def test_rates_are_held_against_the_memory() -> None:
    """GB/s are bytes over the median, and their share that of as many threads as the row has."""
    flat = flatten("b", row("petalsd", 10.0, nbytes=160_000_000, threads=2), [], BANDWIDTH)
    assert (flat["gb_per_s"], flat["bandwidth_gb_per_s"], flat["bandwidth_share"]) == (16.0, 32.0, 0.5)
    assert flatten("b", row("petalsd", 10.0), [], BANDWIDTH)["bandwidth_share"] is None


def test_results_carry_the_machine(tmp_path: Path) -> None:
    """CSV and JSON hold the same rows under a key that stays; each CSV row has processor, versions and commit."""
    measured = row("petalsd", 2.0, format="float32", threads=1)
    publish("made_up", [measured], Run(machine.describe(), BANDWIDTH, ["something: no time left"]), tmp_path)
    with (tmp_path / "made_up.csv").open() as file:
        (line,) = csv.DictReader(file)
    document = json.loads((tmp_path / "made_up.json").read_text())
    assert document["rows"][0]["key"] == line["key"] == "made_up/step/petalsd/format=float32,threads=1"
    assert (line["provider"], float(line["median"]), line["setting"]) == (
        "petalsd",
        2.0,
        "format=float32 threads=1",
    )
    assert (
        line.keys()
        >= machine.describe().keys()
        >= {"cpu", "cores", "torch", "petals", "commit", "load_1_min"}
    )
    assert document["skipped"] == ["something: no time left"]
    assert read_results(tmp_path) == {"made_up": document}


@pytest.mark.parametrize("figure", [math.nan, math.inf, 0.0, -1.0])
def test_a_figure_that_is_none_breaks_the_benchmark(figure: float) -> None:
    """NaN, infinity, zero and less are refused, and so are no rows at all and a row measured twice."""
    with pytest.raises(BrokenBenchmark):
        check_rows([row("petalsd", figure)])
    with pytest.raises(BrokenBenchmark, match="no rows"):
        check_rows([])
    with pytest.raises(BrokenBenchmark, match="twice"):
        check_rows([row("petalsd", 1.0), row("petalsd", 2.0)])


def test_bandwidth_is_measured_for_one_and_all_threads() -> None:
    """Positive, for 1 thread and as many as asked; another number gets that of the next smaller one."""
    measured = measure_bandwidth(threads=2, passes=2, buffer_bytes=1 << 20)
    assert set(measured.gb_per_s) == {1, 2}
    assert all(rate > 0 for rate in measured.gb_per_s.values())
    assert BANDWIDTH.of(3) == 32.0
