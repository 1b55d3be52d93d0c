"""Rows of results: printed as a table, kept as CSV (for plots) and JSON (with the machine) in results/."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.timing import Spread

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. ``setting`` says in words what was varied between rows of one provider."""

    provider: str
    setting: str
    metric: str
    unit: str
    spread: Spread


def publish(benchmark: str, rows: Sequence[Row]) -> None:
    """Write results/<benchmark>.csv and .json, replacing those of the last run, and print the table."""
    facts = machine.describe()
    flat = [{"benchmark": benchmark, **_flatten(row)} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*flat[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in flat)
    document = {"benchmark": benchmark, "machine": facts, "rows": flat}
    (RESULTS / f"{benchmark}.json").write_text(json.dumps(document, indent=2) + "\n")
    _print(benchmark, rows)


def _flatten(row: Row) -> dict[str, object]:
    spread = {key: round(value, 5) for key, value in asdict(row.spread).items()}
    return {
        "provider": row.provider,
        "setting": row.setting,
        "metric": row.metric,
        "unit": row.unit,
        **spread,
    }


def _print(benchmark: str, rows: Sequence[Row]) -> None:
    table = Table("provider", "setting", "metric", "median", "p20", "p80", "n", "unit", title=benchmark)
    for row in rows:
        numbers = (f"{value:.3f}" for value in (row.spread.median, row.spread.p20, row.spread.p80))
        table.add_row(row.provider, row.setting, row.metric, *numbers, str(row.spread.count), row.unit)
    console = Console()
    console.width = max(console.width, 130)  # a log file has no width of its own
    console.print(table)
