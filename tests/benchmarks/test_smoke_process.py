"""The benchmarks that need no server run on any model and give figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.providers import Fleet
from benchmarks.registry import find_benchmarks
from tests.benchmarks.served import SERVED
from tests.benchmarks.smoke import run_smoke
from tests.tiers import nightly_except

pytestmark = pytest.mark.timeout(300)  # fresh processes import everything anew, on a busy machine too
BENCHMARKS = find_benchmarks()
IN_PROCESS = [name for name in BENCHMARKS if name not in SERVED]


@pytest.mark.parametrize("name", nightly_except(IN_PROCESS, *(name for name in IN_PROCESS if name != "load")))
def test_it_gives_figures(name: str, small_model: Path, fleet: Fleet, tmp_path: Path) -> None:
    """Rows of petalsd in the published format."""
    rows = run_smoke(BENCHMARKS[name], small_model, fleet, tmp_path)
    assert "petalsd" in {row["provider"] for row in rows}
