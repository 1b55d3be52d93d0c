"""What becomes of a run's rows: files, a picture, a table for people, and whether they may be accepted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bandwidth import Bandwidth
from benchmarks.charts import Bar, BarPanel, Panel, draw_panels
from benchmarks.gpu.cards import SHAPES, Card
from benchmarks.gpu.case import ERROR, TIME
from benchmarks.gpu.peaks import COPY_BYTES
from benchmarks.gpu.roofline import BATCHES, Step, block_launches, limit_s, predict_s
from benchmarks.gpu.suite import Bench
from benchmarks.gpu.verdict import SPAN_STEP, STEP, WRONG_VALUES, failures, regressions
from benchmarks.report import OURS, PETALS, RESULTS, Row, Run, describe_setting, publish

ACCEPTED = RESULTS / "gpu"
_KINDS = {OURS: "ours", PETALS: "petals"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run on ``card`` (with its measured peaks); ``document`` is what its JSON file holds."""

    card: Card
    rows: Sequence[Row]
    document: Mapping[str, Any]
    complaints: Sequence[str]


def slug(name: str) -> str:
    """A card's name as that of a file: NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def conclude(
    card: Card,
    rows: Sequence[Row],
    machine: Mapping[str, str],
    bench: Bench,
    directory: Path,
    accepted: Path = ACCEPTED,
) -> Outcome:
    """Write the files of a run to ``directory``, and judge it; ``accepted`` has the documents of earlier ones.

    A run of some parts is compared in what it measured.
    """
    name = slug(card.name)
    run = Run(machine, Bandwidth({1: card.gb_per_s}, COPY_BYTES), bench.skipped)
    publish(name, rows, run, directory)
    document = json.loads((directory / f"{name}.json").read_text())
    complaints = list(failures(rows, card, {shape.name: shape for shape in SHAPES}))
    earlier = accepted / f"{name}.json"
    if earlier.exists():
        complaints += regressions(json.loads(earlier.read_text()), document, is_whole=bench.is_whole)
    outcome = Outcome(card, rows, document, complaints)
    if panels := list(_panels(outcome)):
        peaks = f"{card.gb_per_s:.0f} GB/s, {card.tflops:.0f} TFLOP/s"
        note = f"{machine['date']}, commit {machine['commit']}, {peaks}"
        (directory / f"{name}.svg").write_text(draw_panels(card.name, note, panels, 2))
    return outcome


def accept(outcome: Outcome, directory: Path, accepted: Path = ACCEPTED) -> Path:
    """Make this run the one that later ones are compared with. ValueError when its values are wrong."""
    if wrong := [complaint for complaint in outcome.complaints if complaint.startswith(WRONG_VALUES)]:
        raise ValueError(f"not accepted: {wrong[0]}")
    accepted.mkdir(parents=True, exist_ok=True)
    name = f"{slug(outcome.card.name)}.json"
    return Path(shutil.copy(directory / name, accepted / name))


def summary(outcome: Outcome) -> str:
    """Markdown: what is wrong, blocks beside their predictions, kernels beside the card's peaks."""
    card = outcome.card
    lines = [f"## {card.name}: {card.gb_per_s:.0f} GB/s, {card.tflops:.0f} TFLOP/s measured", ""]
    lines += [f"* **{complaint}**" for complaint in outcome.complaints] or ["Nothing is wrong with this run."]
    return "\n".join([*lines, "", *_block_lines(outcome), "", *_kernel_lines(outcome), ""])


def _block_lines(outcome: Outcome) -> Iterator[str]:
    yield "| block | provider | us | predicted | at most |"
    yield "|---|---|---|---|---|"
    for row in outcome.rows:
        if row.metric in (STEP, SPAN_STEP) and row.setting["mode"] == "replayed":
            predicted, limit = _predicted_us(row, outcome.card)
            yield (
                f"| {_what(row)} | {row.provider} | {row.spread.median:.0f} | {predicted:.0f} | {limit:.0f} |"
            )


def _kernel_lines(outcome: Outcome) -> Iterator[str]:
    yield "| kernel | provider | us | GB/s | of peak | beside |"
    yield "|---|---|---|---|---|---|"
    for row in outcome.document["rows"]:
        if row["metric"] == TIME:
            ratio = f"{row['ratio']:.2f} x {row['reference']}" if row["ratio"] else ""
            yield (
                f"| {describe_setting(row['setting'])} | {row['provider']} | {row['median']:.1f} | "
                f"{row['gb_per_s']:.0f} | {100 * row['bandwidth_share']:.0f} % | {ratio} |"
            )


def _panels(outcome: Outcome) -> Iterator[Panel]:
    """Steps of blocks by provider, beside the prediction; shares of the memory's bandwidth by kernel."""
    dense = [
        row for row in outcome.rows
        if row.metric == STEP and row.setting["mode"] == "replayed" and row.setting["weights"] == "bfloat16"
    ]  # fmt: skip
    for shape in SHAPES:
        for batch in BATCHES:
            rows = [
                row for row in dense if (row.setting["model"], row.setting["rows"]) == (shape.name, batch)
            ]
            if rows:
                bars = [
                    Bar(row.provider, row.spread.median, _KINDS.get(row.provider, "other")) for row in rows
                ]
                predicted, _ = _predicted_us(rows[0], outcome.card)
                title = f"A block of {shape.name}, {batch} rows"
                yield BarPanel(
                    title, "us per decode step, less is better", [*bars, Bar("predicted", predicted, "other")]
                )
    shares = [
        Bar(_what(row), 100 * (row.nbytes or 0) / row.spread.median / 1e3 / outcome.card.gb_per_s, "ours")
        for row in outcome.rows
        if row.provider == OURS and row.metric == TIME and row.setting["kernel"] == "decode_attention"
    ]
    if shares:
        yield BarPanel("Decode attention", "% of the memory's bandwidth, more is better", shares)


def _predicted_us(row: Row, card: Card) -> tuple[float, float]:
    """Of the step of a block or a span: what it should take, and at most."""
    setting = row.setting
    shape = next(shape for shape in SHAPES if shape.name == setting["model"])
    step = Step(int(setting["rows"]), int(setting["context"]), str(setting["weights"]))
    launches, blocks = block_launches(shape, step, card), int(setting.get("blocks", 1))
    of_a_block = predict_s(launches, card), limit_s(launches, card, shape.bandwidth_share)
    return 1e6 * blocks * of_a_block[0], 1e6 * blocks * of_a_block[1]


def _what(row: Row) -> str:
    hidden = ("mode", "kernel", "tolerance") if row.metric != ERROR else ()
    return describe_setting({name: value for name, value in row.setting.items() if name not in hidden})
