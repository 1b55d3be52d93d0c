"""What lets a run on a GPU fail, by figures that nobody had to measure."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from benchmarks.bandwidth import Bandwidth
from benchmarks.gpu.cards import SHAPES, Card
from benchmarks.gpu.case import ERROR, TIME
from benchmarks.gpu.roofline import Step, block_launches, limit_s
from benchmarks.gpu.verdict import LAUNCHES, STEP, failures, regressions
from benchmarks.report import OURS, Row, flatten
from benchmarks.timing import Spread

CARD = Card("a card", 1000, 100, 100)
BY_NAME = {shape.name: shape for shape in SHAPES}
SMALL = SHAPES[0]
BLOCK = {"model": SMALL.name, "weights": "bfloat16", "rows": 1, "context": 4096, "mode": "replayed"}


def spread(median: float, width: float = 0.01) -> Spread:
    return Spread(median, *(median * (1 + width * step) for step in (-2, -1, 1, 2)), count=50)


def row(
    metric: str, setting: dict[str, Any], median: float, unit: str = "us", nbytes: int | None = None
) -> Row:
    return Row(OURS, setting, metric, unit, spread(median), nbytes)


LIMIT_US = 1e6 * limit_s(block_launches(SMALL, Step(1), CARD), CARD, SMALL.bandwidth_share)
ATTENTION = {"kernel": "decode_attention", "rows": 16, "context": 4096}
ERROR_SETTING = {"kernel": "add_norm", "rows": 1, "tolerance": "0.006"}


@pytest.mark.parametrize(
    ("measured", "complaint"),
    [
        (row(ERROR, ERROR_SETTING, 0.005, "x"), ""),
        (row(ERROR, ERROR_SETTING, 0.007, "x"), "wrong values: error, kernel=add_norm"),
        (row(ERROR, ERROR_SETTING, float("nan"), "x"), "wrong values"),
        (row(LAUNCHES, BLOCK, 10, "launches"), ""),
        (row(LAUNCHES, BLOCK, 11, "launches"), "too many launches"),
        (row(STEP, BLOCK, LIMIT_US * 0.99), ""),
        (row(STEP, BLOCK, LIMIT_US * 1.01), "too slow: block step"),
        (row(STEP, {**BLOCK, "mode": "launched"}, LIMIT_US * 5), ""),
        (row(TIME, ATTENTION, 100, nbytes=81_000_000), ""),
        (row(TIME, ATTENTION, 100, nbytes=79_000_000), "too slow: kernel, kernel=decode_attention"),
        (row(TIME, {**ATTENTION, "rows": 1}, 100, nbytes=10), ""),
        (replace(row(STEP, BLOCK, LIMIT_US * 9), provider="transformers"), ""),
    ],
)  # fmt: skip
def test_a_run_by_itself(measured: Row, complaint: str) -> None:
    """Values within their tolerance, ten launches, and the targets that the page names; others are not judged."""
    found = list(failures([measured], CARD, BY_NAME))
    assert len(found) == bool(complaint)
    assert not complaint or found[0].startswith(complaint)


def document(*rows: Row) -> dict[str, Any]:
    bandwidth = Bandwidth({1: 1000.0}, 1 << 30)
    return {"rows": [flatten("a card", each, rows, bandwidth) for each in rows]}


def with_median(measured: Row, median: float, width: float = 0.01) -> Row:
    return replace(measured, spread=spread(median, width))


STEP_ROW = row(STEP, BLOCK, 100.0)
RATE_ROW = row("kernel rate", ATTENTION, 50.0, "TFLOP/s")
LAUNCH_ROW = row(LAUNCHES, BLOCK, 9, "launches")


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        (STEP_ROW, with_median(STEP_ROW, 104), ""),
        (STEP_ROW, with_median(STEP_ROW, 106), "worse: block step"),
        (STEP_ROW, with_median(STEP_ROW, 106, width=0.06), ""),
        (STEP_ROW, with_median(STEP_ROW, 60), ""),
        (RATE_ROW, with_median(RATE_ROW, 40), "worse: kernel rate"),
        (RATE_ROW, with_median(RATE_ROW, 90), ""),
        (LAUNCH_ROW, with_median(LAUNCH_ROW, 10, width=0.5), "worse: launches of a block"),
        (STEP_ROW, RATE_ROW, "missing: block step"),
        (replace(STEP_ROW, provider="torch"), RATE_ROW, ""),
    ],
)
def test_beside_what_was_accepted(before: Row, after: Row, complaint: str) -> None:
    """Beyond five percent and beyond the spread, one launch more, or gone."""
    found = list(regressions(document(before), document(after)))
    assert len(found) == bool(complaint)
    assert not complaint or found[0].startswith(complaint)


def test_a_part_of_a_run_misses_nothing() -> None:
    """What it measured is compared all the same."""
    accepted = document(STEP_ROW, RATE_ROW)
    assert list(regressions(accepted, document(STEP_ROW), is_whole=False)) == []
    slow = document(with_median(STEP_ROW, 200))
    assert len(list(regressions(accepted, slow, is_whole=False))) == 1


def test_spreads_are_kept() -> None:
    """The gate reads percentiles that the results' files must have."""
    (kept,) = document(STEP_ROW)["rows"]
    assert {name: kept[name] for name in ("median", "p20", "p80")} == {
        name: pytest.approx(value)
        for name, value in asdict(STEP_ROW.spread).items()
        if name in ("median", "p20", "p80")
    }
