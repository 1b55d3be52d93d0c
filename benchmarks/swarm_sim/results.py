"""Outcomes of runs: averaged over seeds, printed, kept as CSV, drawn."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.charts import Bar, BarPanel, draw_panels
from benchmarks.machine import ROOT
from benchmarks.report import RESULTS
from benchmarks.swarm_sim.simulation import Outcome

CSV_FILE = RESULTS / "swarm_sim.csv"
PICTURE = ROOT / "docs" / "benchmarks" / "placement.svg"
_NAMES = {"petalsd": "petalsd", "petals": "stock Petals", "petalsd+petals": "half and half"}
_KINDS = {"petalsd": "ours", "petals": "petals"}


@dataclass(frozen=True, slots=True)
class Summary:
    """One case under one policy: means over the seeds, medians of the times."""

    case: str
    policy: str
    seeds: str
    share: float
    uncovered: float
    moves: float
    cut: float
    wave_s: float
    outage_s: float
    slowest_ms: float

    @classmethod
    def of(cls, runs: Sequence[Outcome]) -> Summary:
        first, last = runs[0], runs[-1]

        def mean(name: str) -> float:
            return statistics.fmean(getattr(run, name) for run in runs)

        return cls(
            case=f"{first.model}/{first.servers}",
            policy=first.policy,
            seeds=f"{first.seed}-{last.seed}",
            share=mean("share"),
            uncovered=mean("uncovered"),
            moves=mean("moves"),
            cut=mean("cut"),
            wave_s=statistics.median(run.wave_s for run in runs),
            outage_s=statistics.median(run.outage_s for run in runs),
            slowest_ms=max(run.slowest_ms for run in runs),
        )


def summarize(runs: Sequence[Outcome]) -> list[Summary]:
    groups: dict[tuple[str, int, str], list[Outcome]] = {}
    for run in runs:
        groups.setdefault((run.model, run.servers, run.policy), []).append(run)
    return [Summary.of(sorted(group, key=lambda run: run.seed)) for group in groups.values()]


def merge(known: Sequence[Mapping[str, str]], new: Sequence[Summary]) -> list[dict[str, str]]:
    """Rows of the file: those of ``new`` replace those of the same case and policy, the others stay."""
    rows = {(row["case"], row["policy"]): dict(row) for row in known}
    for summary in new:
        rows[summary.case, summary.policy] = {name: _text(value) for name, value in asdict(summary).items()}
    return list(rows.values())


def publish(new: Sequence[Summary], file: Path = CSV_FILE, picture: Path = PICTURE) -> None:
    """Write both files, keeping what earlier runs measured in other cases."""
    known = []
    if file.exists():
        with file.open(newline="") as opened:
            known = list(csv.DictReader(opened))
    rows = merge(known, new)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(draw(rows))


def draw(rows: Sequence[Mapping[str, str]]) -> str:
    """A panel per case: the share of what offline search with global knowledge reaches."""
    cases: dict[str, list[Bar]] = {}
    for row in rows:
        label = _NAMES.get(row["policy"], row["policy"])
        bar = Bar(label, 100 * float(row["share"]), _KINDS.get(row["policy"], "other"), "%")
        cases.setdefault(row["case"], []).append(bar)
    panels = [
        BarPanel(f"{case.replace('/', '-class model, ')} servers", "throughput; more is better", bars)
        for case, bars in cases.items()
    ]
    note = "Simulated: joins, crashes, an outage of a region, late views. 100 % is offline search."
    return draw_panels("What placement makes of a swarm", note, panels, 2)


def print_table(summaries: Sequence[Summary]) -> None:
    names = (
        "case",
        "policy",
        "seeds",
        "share",
        "uncovered",
        "moves/h",
        "cut/h",
        "wave",
        "outage",
    )
    table = Table(*names)
    for one in summaries:
        table.add_row(
            one.case,
            one.policy,
            one.seeds,
            f"{one.share:.3f}",
            f"{100 * one.uncovered:.2f} %",
            f"{one.moves:.2f}",
            f"{one.cut:.3f}",
            _seconds(one.wave_s),
            _seconds(one.outage_s),
        )
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if math.isfinite(value) else "never"
