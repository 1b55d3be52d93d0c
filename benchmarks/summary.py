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
    facts = table.machine("decode_step") or table.machine("step_latency")
    if facts:
        bandwidth = table.bandwidth("decode_step", 1)
        memory = f", memory {bandwidth:.1f} GB/s by one thread" if bandwidth else ""
        text += [
            "",
            f"{facts['cpu']}, {facts['cores']} cores{memory}, torch {facts['torch']}, commit {facts['commit']}",
        ]
    return "\n".join(text)


def _lines(table: ResultsTable) -> Iterator[Line]:
    step = "decode step of one block"
    yield Line(
        "one-block decode step over loopback p2p", table.row("step_latency", step, OURS),
        table.row("step_latency", step, PETALS) or table.row("step_latency", step, "echo"),
    )  # fmt: skip
    yield from _runner_lines(table)
    yield from _served_lines(table)
    yield from _prefill_lines(table)
    yield _context_line(table)
    yield _compared(table, "sessions admitted to the same cache", "admission", "sessions admitted")
    yield from _interference_lines(table)
    yield from _pass_lines(table)
    for kind in ("float32", "bfloat16", "int8", "int4"):
        yield Line(f"loading, {kind}", table.row("load", "load time", OURS, format=kind),
                   table.row("load", "load time", TRANSFORMERS, format=kind))  # fmt: skip
        over = table.row("load", "resident weights over the model's bytes", OURS, format=kind)
        yield Line(f"resident weights over the model's bytes, {kind}", over)


def _runner_lines(table: ResultsTable) -> Iterator[Line]:
    for kind in ("float32", "bfloat16", "int8", "int4"):
        for sessions in (1, 8, 16, 32):
            which = {**_RUNNER, "format": kind, "sessions": sessions}
            ours = table.row("decode_step", "decode step", OURS, **which)
            plain = {**which, "format": kind if kind in ("float32", "bfloat16") else "bfloat16"}
            other = table.row("decode_step", "decode step", TRANSFORMERS, **plain)
            share = ours and ours["bandwidth_share"]
            remark = (
                f"{ours['gb_per_s']:.1f} GB/s, {100 * share:.0f} % of the memory" if ours and share else ""
            )
            yield Line(
                f"decode step of all blocks, {kind}, {sessions} session(s), 1 thread", ours, other, remark
            )


def _served_lines(table: ResultsTable) -> Iterator[Line]:
    for work, benchmark, metric, which in (
        ("one client generates 64 tokens", "generation", "generation", {}),
        ("8 clients decode at once", "aggregate_decode", "aggregate decode", {"sessions": 8}),
    ):
        # All are compared with stock Petals as a whole, server and client, in the format that it is faster in.
        stock = table.best(benchmark, metric, PETALS, client=PETALS, **which)
        for client, kind in product((PETALS, OURS), ("float32", "bfloat16")):
            ours = table.row(benchmark, metric, OURS, client=client, format=kind, **which)
            same = table.row(benchmark, metric, PETALS, client=client, format=kind, **which)
            remark = (
                f"{_times(ours, same)} with the same client" if ours and same and client != PETALS else ""
            )
            yield Line(f"{work}, client {client}, {kind}", ours, stock, remark)


def _prefill_lines(table: ResultsTable) -> Iterator[Line]:
    for kind in ("float32", "bfloat16", "int8", "int4"):
        for tokens in (256, 2048):
            which: dict[str, int | str] = {"tokens": tokens, "threads": 1}
            plain = kind if kind in ("float32", "bfloat16") else "bfloat16"
            yield Line(
                f"prefill of {tokens} tokens, {kind}, 1 thread",
                table.row("prefill", "prefill", OURS, format=kind, **which),
                table.row("prefill", "prefill", TRANSFORMERS, format=plain, **which),
            )


def _context_line(table: ResultsTable) -> Line:
    """Growth of a step from context 16 to 8192, beside the time in which the memory gives the longer cache."""
    which: dict[str, int | str] = {"format": "bfloat16", "sessions": 1, "threads": 1}
    short = table.row("decode_step", "decode step", OURS, context=16, **which)
    long = table.row("decode_step", "decode step", OURS, context=8192, **which)
    if short is None or long is None:
        return Line("decode step at context 8192", None)
    read = [row["gb_per_s"] * row["median"] for row in (short, long)]
    floor_ms = (read[1] - read[0]) / long["bandwidth_gb_per_s"]
    grown = (long["median"] - short["median"]) / floor_ms
    remark = f"{grown:.2f} x the floor of its keys and values ({format_value(floor_ms)} ms)"
    return Line("decode step at context 8192 against context 16, 1 session, bfloat16", long, short, remark)


def _interference_lines(table: ResultsTable) -> Iterator[Line]:
    for provider in (OURS, PETALS):
        alone = table.row("interference", "decode step, alone", provider)
        beside = table.row("interference", "decode step, beside a prompt of 2048", provider)
        if alone and beside:
            times = f"{beside['p95'] / alone['median']:.1f} x the median alone"
            remark = f"p95 {format_value(beside['p95'])} ms is {times}"
            yield Line(f"decode step beside a 2048-token prefill, {provider}", beside, alone, remark)
    metric = "time to first token of 128, 7 decode"
    yield _compared(table, "time to first token, 128 tokens, 7 others decode", "interference", metric)


def _pass_lines(table: ResultsTable) -> Iterator[Line]:
    for metric in ("forward pass", "backward pass"):
        yield Line(f"{metric} through a server", table.row("passes", metric, OURS, where="server"),
                   table.row("passes", metric, PETALS, where="server"))  # fmt: skip
        for kind in ("float32", "bfloat16", "int8", "int4"):
            which = {"format": kind, "where": "process"}
            yield Line(f"{metric} in process, {kind}", table.row("passes", metric, OURS, **which),
                       table.row("passes", metric, TRANSFORMERS, **which))  # fmt: skip


def _compared(table: ResultsTable, work: str, benchmark: str, metric: str) -> Line:
    return Line(work, table.row(benchmark, metric, OURS), table.row(benchmark, metric, PETALS))


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
