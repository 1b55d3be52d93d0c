"""The benchmark of a decoding client beside another's work runs on any model and has a row for each figure."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import interference
from tests.tiny_models import make_tiny


async def test_every_work_has_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps alone and beside, their ratio, and the work alone and beside; none of them takes no time."""
    make_tiny("llama", tmp_path)
    monkeypatch.setattr(interference, "ALONE_S", 0.02)
    options = argparse.Namespace(
        model=tmp_path,
        dtype="float32",
        works=list(interference.WORKS),
        tokens=64,
        pass_rows=2,
        rounds=2,
        threads=1,
    )
    rows = await interference.measure(options)
    assert len(rows) == 7 * len(interference.WORKS)
    assert {row.unit for row in rows} == {"ms", "x"}
    assert all(row.spread.count == 2 and row.spread.p20 > 0 for row in rows)


@pytest.mark.parametrize(("samples", "expected"), [([3.0], 3.0), (list(range(101)), 95.0)])
def test_the_95th_percentile(samples: list[float], expected: float) -> None:
    """Also of a round in which a single step was made."""
    assert interference.percentile_95(samples) == pytest.approx(expected)
