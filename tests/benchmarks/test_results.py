"""What a benchmark publishes: the right summary, and rows that say what they were measured on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import machine, report
from benchmarks.timing import Spread, summarize


def test_a_summary_is_the_median_and_the_spread() -> None:
    """Percentiles are interpolated; one slow sample does not move the median."""
    assert summarize([1.0, 2.0, 3.0, 4.0, 5.0, 1000.0]) == Spread(median=3.5, p20=2.0, p80=5.0, count=6)


def test_results_carry_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CSV and JSON hold the same rows; each CSV row has processor, versions and commit."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    spread = summarize([1.0, 2.0, 3.0])
    report.publish("made_up", [report.Row("petalsd", "1 thread(s)", "step", "ms", spread)])
    with (tmp_path / "made_up.csv").open() as file:
        (row,) = csv.DictReader(file)
    document = json.loads((tmp_path / "made_up.json").read_text())
    assert (row["provider"], float(row["median"])) == ("petalsd", 2.0)
    assert document["rows"][0]["median"] == 2.0
    assert row.keys() >= machine.describe().keys() >= {"cpu", "cores", "torch", "commit", "load_1_min"}
