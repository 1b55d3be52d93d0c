"""Runs benchmarks one after the other, within a bounded time, and publishes what each found."""

from __future__ import annotations

import math
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.bandwidth import measure_bandwidth
from benchmarks.benchmark import Benchmark, Options, say
from benchmarks.providers import Fleet
from benchmarks.quiet import quiet_libraries
from benchmarks.registry import find_benchmarks
from benchmarks.report import RESULTS, Row, Run, publish

# The whole suite; benchmarks leave settings out when their own share of it is used up.
LIMIT_S = 600.0
COMPARE_LIMIT_S = 1200.0
_SMOKE_BANDWIDTH = (2, 8 << 20)


class BrokenBenchmark(Exception):
    """A benchmark that measured nothing, or something that is no figure."""


@dataclass(frozen=True, slots=True)
class SuiteOptions:
    """As on the command line; ``results`` is the directory that gets the files."""

    model: Path
    results: Path = RESULTS
    threads: int = 1
    compare: bool = False
    smoke: bool = False

    @property
    def limit_s(self) -> float:
        """Seconds after which nothing new is begun."""
        return COMPARE_LIMIT_S if self.compare else LIMIT_S


def run_suite(suite: SuiteOptions, names: Sequence[str]) -> list[str]:
    """Run these benchmarks; the names of those that failed, whose traceback is on standard error."""
    quiet_libraries()
    passes = _SMOKE_BANDWIDTH if suite.smoke else ()
    bandwidth = measure_bandwidth(suite.threads, *passes)
    say(f"memory: {bandwidth}")
    found, started, failed = find_benchmarks(), time.monotonic(), []
    for number, name in enumerate(names, 1):
        left_s = suite.limit_s - (time.monotonic() - started)
        say(f"[{number}/{len(names)}] {name}: {found[name].description}")
        if left_s <= 0:
            say("  skipped: no time left; what it found last time stays")
            continue
        begun = time.monotonic()
        try:
            with Fleet() as fleet:
                rows, skipped = run_one(found[name], suite, fleet, left_s)
                publish(name, rows, Run(machine.describe(), bandwidth, skipped), suite.results)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        say(f"  {time.monotonic() - begun:.0f} s")
    if failed:
        say(f"failed: {', '.join(failed)}")
    return failed


def run_one(
    benchmark: Benchmark, suite: SuiteOptions, fleet: Fleet, left_s: float = math.inf
) -> tuple[list[Row], list[str]]:
    """The rows, checked, and what was left out. Raises what the benchmark raises, or BrokenBenchmark."""
    budget_s = min(benchmark.budget_s * (2 if suite.compare else 1), left_s)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix=f"{benchmark.name}-") as directory:
        options = Options(
            suite.model.resolve(), Path(directory), fleet, suite.threads, suite.compare, suite.smoke,
            time.monotonic() + budget_s,
        )  # fmt: skip
        try:
            rows = benchmark.run(options)
        finally:
            torch.set_num_threads(threads)
    check_rows(rows)
    return rows, options.skipped


def check_rows(rows: Sequence[Row]) -> None:
    """Every figure is finite and positive, and every row has a name of its own."""
    if not rows:
        raise BrokenBenchmark("no rows")
    seen = set()
    for row in rows:
        spread = row.spread
        name = (row.provider, row.setting_text, row.metric)
        figures = (spread.median, spread.p5, spread.p20, spread.p80, spread.p95)
        if not all(math.isfinite(figure) and figure > 0 for figure in figures) or spread.count < 1:
            raise BrokenBenchmark(f"{name}: {spread}")
        if name in seen:
            raise BrokenBenchmark(f"{name}: measured twice")
        seen.add(name)
