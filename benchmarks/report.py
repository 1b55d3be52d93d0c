"""Rows of results: compared with each other, printed as a table, kept as CSV and JSON in results/."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from benchmarks.bandwidth import Bandwidth
from benchmarks.timing import Spread

RESULTS = Path(__file__).resolve().parent / "results"

Setting: TypeAlias = Mapping[str, int | str]

OURS = "petalsd"
PETALS = "petals-2.2"
TRANSFORMERS = "transformers"
TORCH = "torch"
# Whom the others are compared with: the first of these that a benchmark has measured.
REFERENCES = (PETALS, TRANSFORMERS, TORCH)
_TIME_UNITS = ("s", "ms", "us", "ns")
_SIZE_UNITS = ("MiB", "KiB", "B", "x")
_DIGITS = 5


def describe_setting(setting: Setting) -> str:
    """Such as ``format=bfloat16 sessions=8``."""
    return " ".join(f"{name}={value}" for name, value in setting.items())


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    setting   what is varied between rows of a provider, such as ``{"format": "bfloat16", "sessions": 8}``
    metric    what is measured, a word of the field; with ``setting`` and provider it names the row
    nbytes    what one sample reads from memory at least; None where that says nothing
    """

    provider: str
    setting: Setting
    metric: str
    unit: str
    spread: Spread
    nbytes: int | None = None

    @property
    def setting_text(self) -> str:
        return describe_setting(self.setting)

    @property
    def is_lower_better(self) -> bool:
        return self.unit in (*_TIME_UNITS, *_SIZE_UNITS)

    def times_better_than(self, other: Row) -> float:
        """Ratio of the medians, above 1 where this row is the better one."""
        mine, others = self.spread.median, other.spread.median
        return others / mine if self.is_lower_better else mine / others


def find_reference(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row that ``row`` is compared with: same metric and setting, of the first provider in REFERENCES.

    Where that provider has nothing in this row's format, its best format counts.
    """
    for provider in REFERENCES:
        if row.provider == provider:
            return None
        same_metric = [other for other in rows if other.provider == provider and other.metric == row.metric]
        exact = [other for other in same_metric if other.setting == row.setting]
        formats = [other for other in same_metric if _but_format(other) == _but_format(row)]
        if exact or formats:
            return exact[0] if exact else max(formats, key=lambda other: other.times_better_than(row))
    return None


def _but_format(row: Row) -> dict[str, int | str]:
    return {name: value for name, value in row.setting.items() if name != "format"}


@dataclass(frozen=True, slots=True)
class Run:
    """What all rows of one run share: the machine, its memory bandwidth, and what was left out."""

    machine: Mapping[str, str]
    bandwidth: Bandwidth
    skipped: Sequence[str] = ()


def publish(benchmark: str, rows: Sequence[Row], run: Run, directory: Path = RESULTS) -> None:
    """Write ``directory``/<benchmark>.csv and .json, replacing those of the last run, and print the table."""
    flat = [flatten(benchmark, row, rows, run.bandwidth) for row in rows]
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{benchmark}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*flat[0], *run.machine])
        writer.writeheader()
        writer.writerows({**row, "setting": describe_setting(row["setting"]), **run.machine} for row in flat)
    document = {
        "benchmark": benchmark,
        "machine": dict(run.machine),
        "bandwidth": asdict(run.bandwidth),
        "skipped": list(run.skipped),
        "rows": flat,
    }
    (directory / f"{benchmark}.json").write_text(json.dumps(document, indent=2) + "\n")
    _print(benchmark, flat)


def flatten(benchmark: str, row: Row, rows: Sequence[Row], bandwidth: Bandwidth) -> dict[str, Any]:
    """The row as it is kept; the same keys in every benchmark. ``key`` names it from run to run."""
    reference = find_reference(row, rows)
    seconds = _seconds(row)
    gb_per_s = None if row.nbytes is None or seconds is None else row.nbytes / seconds / 1e9
    ceiling = None if gb_per_s is None else bandwidth.of(int(row.setting.get("threads", 1)))
    return {
        "benchmark": benchmark,
        "key": "/".join([benchmark, row.metric, row.provider, row.setting_text.replace(" ", ",")]),
        "provider": row.provider,
        "setting": dict(row.setting),
        "metric": row.metric,
        "unit": row.unit,
        "is_lower_better": row.is_lower_better,
        **{name: _round(value) for name, value in asdict(row.spread).items()},
        "reference": reference.provider if reference else None,
        "ratio": _round(row.times_better_than(reference)) if reference else None,
        "gb_per_s": _round(gb_per_s),
        "bandwidth_gb_per_s": _round(ceiling),
        "bandwidth_share": _round(gb_per_s / ceiling) if gb_per_s is not None and ceiling else None,
    }


def read_results(directory: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The documents of the last runs by benchmark; those that are not there are missing."""
    documents = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return {document["benchmark"]: document for document in documents}


def _seconds(row: Row) -> float | None:
    if row.unit not in _TIME_UNITS:
        return None
    return row.spread.median / 1000 ** _TIME_UNITS.index(row.unit)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)


def _print(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> None:
    names = ("provider", "setting", "metric", "median", "p5", "p95", "n", "unit", "ratio", "GB/s", "of peak")
    table = Table(*names, title=benchmark)
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} x {row['reference']}"
        share = "" if row["bandwidth_share"] is None else f"{100 * row['bandwidth_share']:.0f} %"
        speed = "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f}"
        numbers = [f"{row[name]:.3f}" for name in ("median", "p5", "p95")]
        words = [row["provider"], describe_setting(row["setting"]), row["metric"]]
        table.add_row(*words, *numbers, str(row["count"]), row["unit"], ratio, speed, share)
    console = Console()
    console.width = max(console.width, 170)  # a log file has no width of its own
    console.print(table)
