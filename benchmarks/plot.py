"""Draws the last run's results as SVG: one picture for the README, and one for each area for docs/benchmarks.md.

Each picture is a list of panels. A panel whose figures were not measured is left out, and so is a picture without
any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.benchmark import say
from benchmarks.charts import Bar, BarPanel, Line, LinePanel, Panel, draw_panels, format_value
from benchmarks.machine import ROOT
from benchmarks.report import OURS, PETALS, TRANSFORMERS
from benchmarks.results_table import Figure, ResultsTable

PICTURES = ROOT / "docs" / "benchmarks"

NAMES = {OURS: "petalsd", PETALS: "Petals 2.2", TRANSFORMERS: "transformers", "echo": "bare echo"}
KINDS = {OURS: "ours", PETALS: "petals"}
BEST_FORMAT, PLAIN_FORMAT = "bfloat16", "float32"
FORMATS = (PLAIN_FORMAT, BEST_FORMAT, "int8", "int4")


def draw_all(documents: Mapping[str, Mapping[str, Any]], directory: Path = PICTURES) -> list[Path]:
    """Write every picture for which there are figures; the files."""
    written = []
    for name, (head, panels, columns) in PICTURE_LIST.items():
        table = ResultsTable(documents)  # of its own: it says below of which runs its figures are
        drawn = [panel for panel in panels(table) if panel is not None]
        if drawn:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"{name}.svg"
            path.write_text(draw_panels(head, _small_print(table), drawn, columns))
            written.append(path)
    say(f"pictures: {', '.join(path.name for path in written)}")
    return written


def overview(table: ResultsTable) -> Iterable[Panel | None]:
    """What the README shows."""
    yield bars(
        "One block over loopback", "ms per decode step, less is better",
        (table.row("step_latency", "decode step of one block", name) for name in ("echo", PETALS, OURS)),
    )  # fmt: skip
    yield from served(table)
    yield decode_by_sessions(table)
    yield decode_by_format(table)
    yield from admitted(table)


def served(table: ResultsTable) -> Iterable[Panel | None]:
    for title, benchmark, metric, unit, which in (
        ("One client generates", "generation", "generation", "tokens/s", {}),
        (
            "8 clients decode at once",
            "aggregate_decode",
            "aggregate decode",
            "steps/s in all",
            {"sessions": 8},
        ),
    ):
        rows = {
            "Petals 2.2": table.best(benchmark, metric, PETALS, client=PETALS, **which),
            "petalsd server": table.row(benchmark, metric, OURS, client=PETALS, format=PLAIN_FORMAT, **which),
            "+ petalsd client": table.row(benchmark, metric, OURS, client=OURS, format=PLAIN_FORMAT, **which),
            "+ bfloat16": table.row(benchmark, metric, OURS, client=OURS, format=BEST_FORMAT, **which),
        }
        yield named_bars(title, f"{unit}, more is better; all 30 blocks", rows)


def admitted(table: ResultsTable) -> Iterable[Panel | None]:
    yield bars(
        "Sessions in the same cache", "asked for 2048 tokens, used 200; more is better",
        (table.row("admission", "sessions admitted", name) for name in (PETALS, OURS)),
    )  # fmt: skip


def decode_by_sessions(table: ResultsTable) -> Panel | None:
    which: dict[str, int | str] = {"format": BEST_FORMAT, "context": 256, "threads": 1}
    return lines(
        "All blocks, by sessions", "ms per step, bfloat16, context 256, 1 thread; less is better", "sessions",
        {name: table.rows("decode_step", "decode step", name, **which) for name in (TRANSFORMERS, OURS)},
        table.bandwidth("decode_step", 1),
    )  # fmt: skip


def decode_by_context(table: ResultsTable) -> Iterable[Panel | None]:
    for sessions in (1, 8, 16, 32):
        which: dict[str, int | str] = {"format": BEST_FORMAT, "sessions": sessions, "threads": 1}
        title = "1 session, by context" if sessions == 1 else f"{sessions} sessions, by context"
        yield lines(
            title, "ms per step, bfloat16, 1 thread; less is better", "context",
            {name: table.rows("decode_step", "decode step", name, **which) for name in (TRANSFORMERS, OURS)},
            table.bandwidth("decode_step", 1),
        )  # fmt: skip


def decode_by_format(table: ResultsTable) -> Panel | None:
    which: dict[str, int | str] = {"sessions": 1, "context": 256, "threads": 1}
    rows = {
        "transformers": table.row("decode_step", "decode step", TRANSFORMERS, format=BEST_FORMAT, **which),
        **{
            f"petalsd {kind}": table.row("decode_step", "decode step", OURS, format=kind, **which)
            for kind in FORMATS
        },
    }
    return named_bars(
        "All blocks, by format", "ms per step, 1 session, context 256, 1 thread; less is better", rows
    )


def prompts(table: ResultsTable) -> Iterable[Panel | None]:
    for tokens in (256, 2048):
        which: dict[str, int | str] = {"tokens": tokens, "threads": 1}
        rows = {
            f"{NAMES[name]} {kind}": table.row("prefill", "prefill", name, format=kind, **which)
            for kind in FORMATS
            for name in (TRANSFORMERS, OURS)
        }
        yield named_bars(
            f"Prompt of {tokens} tokens", "ms through all blocks, 1 thread; less is better", rows
        )


def passes(table: ResultsTable) -> Iterable[Panel | None]:
    for metric in ("forward pass", "backward pass"):
        rows = {
            f"{NAMES[name]} {kind}": table.row("passes", metric, name, format=kind, where="process")
            for kind in FORMATS
            for name in (TRANSFORMERS, OURS)
        }
        yield named_bars(metric.capitalize(), "tokens/s through all blocks; more is better", rows)


def interference(table: ResultsTable) -> Iterable[Panel | None]:
    for name in (PETALS, OURS):
        rows = {"alone (median)": table.row("interference", "decode step, alone", name)}
        for work in ("a prompt of 2048", "a forward pass", "a backward pass"):
            row = table.row("interference", f"decode step, beside {work}", name)
            rows[f"beside {work.removesuffix(' of 2048')}"] = row and {**row, "median": row["p95"]}
        yield named_bars(
            f"{NAMES[name]}: a step beside others' work", "ms, 95th percentile; less is better", rows
        )


def memory(table: ResultsTable) -> Iterable[Panel | None]:
    for title, metric, note in (
        ("Loading", "load time", "seconds, files in the page cache; less is better"),
        ("Resident weights", "resident weights", "MiB after all kinds of use; less is better"),
    ):
        rows = {
            f"{NAMES[name]} {kind}": table.row("load", metric, name, format=kind)
            for kind in FORMATS
            for name in (TRANSFORMERS, OURS)
        }
        yield named_bars(title, note, rows)


PICTURE_LIST: Mapping[str, tuple[str, Callable[[ResultsTable], Iterable[Panel | None]], int]] = {
    "overview": ("petalsd beside what it replaces", overview, 3),
    "decode": ("A decode step through all blocks, in process", decode_by_context, 2),
    "prefill": ("Prompts, in process", prompts, 2),
    "passes": ("Passes without a cache, in process", passes, 2),
    "interference": ("What a decoding client feels of others", interference, 2),
    "memory": ("Loading a model", memory, 2),
}


def bars(title: str, note: str, rows: Iterable[Figure | None]) -> Panel | None:
    """Bars that are named by their provider."""
    return named_bars(title, note, {NAMES[row["provider"]]: row for row in rows if row is not None})


def named_bars(title: str, note: str, rows: Mapping[str, Figure | None]) -> Panel | None:
    """The medians, and how many times better than the first of others; None where there are none."""
    found = {label: row for label, row in rows.items() if row is not None}
    if not found:
        return None
    base = next((row for row in found.values() if row["provider"] in (PETALS, TRANSFORMERS)), None)
    bars = [
        Bar(label, row["median"], KINDS.get(row["provider"], "other"), _times_better(row, base))
        for label, row in found.items()
    ]
    return BarPanel(title, note, bars)


def _times_better(row: Figure, base: Figure | None) -> str:
    if base is None or row["provider"] != OURS:
        return ""
    ratio = row["median"] / base["median"]
    return f"{format_value(1 / ratio if row['is_lower_better'] else ratio)} ×"


def lines(
    title: str, note: str, axis: str, rows: Mapping[str, list[Figure]], bandwidth: float | None
) -> Panel | None:
    """The medians over the setting ``axis``, and what the memory needs at least; None with under two points."""
    drawn = [
        Line(
            NAMES[name],
            sorted((row["setting"][axis], row["median"]) for row in found),
            KINDS.get(name, "other"),
        )
        for name, found in rows.items()
        if len(found) > 1
    ]
    ours = rows[OURS]
    if not any(line.label == NAMES[OURS] for line in drawn):
        return None
    if bandwidth is not None:
        # Bytes over bandwidth, from the rates that the rows have: bytes = rate x time.
        floor = sorted(
            (row["setting"][axis], row["gb_per_s"] * row["median"] / bandwidth)
            for row in ours
            if row["gb_per_s"]
        )
        drawn.append(Line("memory's floor", floor, "floor"))
    return LinePanel(title, note, drawn)


def _small_print(table: ResultsTable) -> str:
    runs = [table.machine(name) for name in table.runs()]
    where = (f"{run['cpu']}, {run['cores']} cores, torch {run['torch']}, {run['date'][:10]}" for run in runs)
    return f"Medians of {'one run' if len(runs) == 1 else f'{len(runs)} runs'} on {'; '.join(where)}."
