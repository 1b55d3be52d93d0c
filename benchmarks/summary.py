"""The last run's main figures as one Markdown table: what was measured, beside whom, and how many times better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.charts import format_value
from benchmarks.report import OURS, PETALS, TRANSFORMERS
from benchmarks.results_table import Figure, ResultsTable

_RUNNER: dict[str, int | str] = {"context": 256, "threads": 1}


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table; ``other`` is what it is compared with, ``remark`` what else there is to say."""

    work: str
    ours: Figure | None
    other: Figure | None = None
    remark: str = ""


def summarize_results(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown; rows that were not measured are left out."""
    table = ResultsTable(documents)
    text = ["| work | compared with | | petalsd | | |", "|---|---|---|---|---|---|"]
    text += [_markdown(line) for line in _lines(table) if line.ours is not None]
    for name in table.runs():
        facts, bandwidth = table.machine(name), table.bandwidth(name, 1)
        memory = f", memory {bandwidth:.1f} GB/s by one thread" if bandwidth else ""
        where = f"{facts['cpu']}, {facts['cores']} cores{memory}"
        text += ["", f"{where}, torch {facts['torch']}, commit {facts['commit']}"]
    return "\n".join(text)


def _lines(table: ResultsTable) -> Iterator[Line]:
    yield _block_line(table)
    yield from _runner_lines(table)
    yield from _served_lines(table)
    yield from _prefill_lines(table)
    yield _context_line(table)
    admitted = [table.row("admission", "sessions admitted", provider) for provider in (OURS, PETALS)]
    yield Line("sessions admitted to the same cache, asking for 2048 tokens and using 200", *admitted)
    yield from _interference_lines(table)
    yield from _start_lines(table)


def _block_line(table: ResultsTable) -> Line:
    ours, stock, echo = (
        table.row("step_latency", "decode step of one block", provider) for provider in (OURS, PETALS, "echo")
    )
    remark = f"a bare echo takes {_value(echo)}" if echo and stock else ""
    return Line("one-block decode step over loopback p2p", ours, stock or echo, remark)


def _runner_lines(table: ResultsTable) -> Iterator[Line]:
    """Beside transformers' step in the same format, or in bfloat16 where it has no such format."""
    for kind, sessions in (*product(("bfloat16",), (1, 8, 32)), ("int8", 1), ("int4", 1)):
        which = {**_RUNNER, "sessions": sessions}
        ours = table.row("decode_step", "decode step", OURS, format=kind, **which)
        other = table.row("decode_step", "decode step", TRANSFORMERS, format="bfloat16", **which)
        share = ours and ours["bandwidth_share"]
        remark = f"{ours['gb_per_s']:.1f} GB/s, {100 * share:.0f} % of the memory" if ours and share else ""
        work = f"decode step of all blocks, {kind}, {sessions} session(s), context 256, 1 thread"
        yield Line(work, ours, other, remark)


def _served_lines(table: ResultsTable) -> Iterator[Line]:
    """Each server in the format that it is faster in; stock Petals' with its own client, as its users run it."""
    for work, benchmark, metric, which in (
        ("one client generates 64 tokens", "generation", "generation", {"tokens": 64}),
        ("8 clients decode at once", "aggregate_decode", "aggregate decode", {"sessions": 8}),
    ):
        stock = table.best(benchmark, metric, PETALS, client=PETALS, **which)
        for client in (PETALS, OURS):
            ours = table.best(benchmark, metric, OURS, client=client, **which)
            formats = [row["setting"]["format"] for row in (ours, stock) if row]
            yield Line(f"{work}, client {client}", ours, stock, " against ".join(formats))


def _prefill_lines(table: ResultsTable) -> Iterator[Line]:
    for kind in ("float32", "bfloat16"):
        which: dict[str, int | str] = {"format": kind, "tokens": 256, "threads": 1}
        ours, other = (
            table.row("prefill", "prefill", provider, **which) for provider in (OURS, TRANSFORMERS)
        )
        yield Line(f"prefill of 256 tokens through all blocks, {kind}, 1 thread", ours, other)


def _context_line(table: ResultsTable) -> Line:
    """Growth of a step from context 16 to 8192, beside the time that the longer cache takes at the speed of the
    weights: the bytes per second of the step that reads next to nothing else."""
    which: dict[str, int | str] = {"format": "bfloat16", "sessions": 1, "threads": 1}
    short = table.row("decode_step", "decode step", OURS, context=16, **which)
    long = table.row("decode_step", "decode step", OURS, context=8192, **which)
    if short is None or long is None:
        return Line("decode step at context 8192", None)
    megabytes = [row["gb_per_s"] * row["median"] for row in (short, long)]
    floor_ms = (megabytes[1] - megabytes[0]) / short["gb_per_s"]
    grown = (long["median"] - short["median"]) / floor_ms
    remark = f"growth {grown:.2f} x the floor of its keys and values ({format_value(floor_ms)} ms)"
    return Line("decode step at context 8192 against context 16, 1 session, bfloat16", long, short, remark)


def _interference_lines(table: ResultsTable) -> Iterator[Line]:
    for provider in (OURS, PETALS):
        alone = table.row("interference", "decode step, alone", provider)
        beside = table.row("interference", "decode step, beside a prompt of 2048", provider)
        if alone and beside:
            times = f"{beside['p95'] / alone['median']:.1f} x the median alone"
            remark = f"p95 {format_value(beside['p95'])} ms is {times}"
            yield Line(f"decode step beside a 2048-token prefill, {provider}", beside, alone, remark)


def _start_lines(table: ResultsTable) -> Iterator[Line]:
    for metric in ("time to serve", "memory once it serves"):
        ours, stock = (table.row("start", metric, provider, start="later") for provider in (OURS, PETALS))
        yield Line(f"a server of all blocks started again: {metric}", ours, stock)


def _markdown(line: Line) -> str:
    assert line.ours is not None
    other, ratio = ["", ""], ""
    if line.other is not None:
        setting = line.other["setting"]
        name = line.other["provider"]
        if name == line.ours["provider"]:
            name = " ".join(f"{key} {value}" for key, value in setting.items() if key == "context") or "alone"
        other = [name, _value(line.other)]
        ratio = _times(line.ours, line.other) if line.other["provider"] != line.ours["provider"] else ""
    return f"| {line.work} | {other[0]} | {other[1]} | {_value(line.ours)} | {ratio} | {line.remark} |"


def _value(row: Figure) -> str:
    return f"{format_value(row['median'])} {row['unit']}"


def _times(ours: Figure, other: Figure) -> str:
    """How many times better: the ratio of the medians, turned where less is better."""
    ratio = ours["median"] / other["median"]
    return f"{1 / ratio if ours['is_lower_better'] else ratio:.2f} x"
