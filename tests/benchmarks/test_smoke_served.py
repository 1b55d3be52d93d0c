"""The benchmarks that start servers run on any model and give figures, of petalsd alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.providers import Fleet
from benchmarks.registry import find_benchmarks
from tests.benchmarks.served import SERVED
from tests.benchmarks.smoke import run_smoke
from tests.tiers import nightly_except

pytestmark = pytest.mark.swarm


@pytest.mark.parametrize("name", nightly_except(SERVED))
def test_it_gives_figures(name: str, small_model: Path, fleet: Fleet, tmp_path: Path) -> None:
    """Rows of petalsd in the published format."""
    rows = run_smoke(find_benchmarks()[name], small_model, fleet, tmp_path)
    assert "petalsd" in {row["provider"] for row in rows}
