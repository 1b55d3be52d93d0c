"""The benchmarks that compare servers run against stock Petals too, with its client and ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.others import petals_seconds
from benchmarks.providers import Fleet
from benchmarks.registry import find_benchmarks
from benchmarks.report import OURS, PETALS
from tests.benchmarks.gpu.doubles import SITE, TINY
from tests.benchmarks.served import SERVED
from tests.benchmarks.smoke import run_smoke
from tests.interop.models import Model

pytestmark = [pytest.mark.interop, pytest.mark.swarm, pytest.mark.nightly, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Servers of the tiny model, one of each kind, for all benchmarks."""
    with Fleet() as fleet:
        yield fleet


def test_petals_block_is_measured_in_its_own_environment() -> None:
    """On a processor here, as on a GPU."""
    found = petals_seconds(replace(SITE, dtype=torch.float32), TINY, [1, 2], 40)
    assert [len(seconds) for seconds in found] == [SITE.samples] * 2
    assert all(each > 0 for seconds in found for each in seconds)


@pytest.mark.parametrize("name", [name for name in SERVED if name != "move"])
def test_it_compares(name: str, tiny: Model, fleet: Fleet, tmp_path: Path) -> None:
    """Rows of both, and petalsd's have a ratio to those of stock Petals."""
    rows = run_smoke(find_benchmarks()[name], tiny.directory, fleet, tmp_path, compare=True)
    ours = [row for row in rows if row["provider"] == OURS and row["setting"].get("where") != "process"]
    assert {row["provider"] for row in rows} >= {PETALS, OURS}
    assert ours and all(row["reference"] == PETALS and row["ratio"] > 0 for row in ours)
