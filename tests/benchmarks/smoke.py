"""Runs one benchmark with the fewest repetitions, and holds what it gives to the format of results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.bandwidth import Bandwidth
from benchmarks.benchmark import Benchmark
from benchmarks.providers import Fleet
from benchmarks.runner import SuiteOptions, run_one

KEYS = {
    "benchmark", "key", "provider", "setting", "metric", "unit", "is_lower_better",
    "median", "p5", "p20", "p80", "p95", "count",
    "reference", "ratio", "gb_per_s", "bandwidth_gb_per_s", "bandwidth_share",
}  # fmt: skip


def run_smoke(
    benchmark: Benchmark, model: Path, fleet: Fleet, directory: Path, *, compare: bool = False
) -> list[dict[str, Any]]:
    """The published rows. Fails on an exception, on no rows, and on a figure that is none; never on a slow one."""
    suite = SuiteOptions(model, directory, threads=1, compare=compare, smoke=True)
    rows, _ = run_one(benchmark, suite, fleet)
    bandwidth = Bandwidth({1: 10.0}, 1 << 20)
    report.publish(benchmark.name, rows, report.Run(machine.describe(), bandwidth), directory)
    document = json.loads((directory / f"{benchmark.name}.json").read_text())
    published: list[dict[str, Any]] = document["rows"]
    assert len(published) == len(rows) > 0
    for row in published:
        assert set(row) == KEYS
        assert math.isfinite(row["median"]) and row["count"] >= 1
    assert len({row["key"] for row in published}) == len(published)
    return published
