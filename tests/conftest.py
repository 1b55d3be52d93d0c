"""What every test gets: one thread for torch, and nothing of another test's logging set-up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

# Read when torch is imported, here and in the processes that tests start. The models of the tests are tiny: more
# threads only wait for each other, and take the cores from the tests beside.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read when a kernel is defined: it then runs in Triton's interpreter. Compiling kernels, or running them on a GPU,
# takes a process without it.
os.environ["TRITON_INTERPRET"] = "1"


# A property of tests that measure: a line for the end of the run. It travels with the report, from workers too.
FIGURE = "figure"


@pytest.fixture(autouse=True)
def logging_of_its_own() -> Iterator[None]:
    """structlog is configured per process; a program under test that does so must not change the next test."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The directory of real weights."""
    path = Path(os.environ.get("PETALSD_DEMO_MODEL", ".cache/demo-model")).resolve()
    if not (path / "config.json").exists():
        pytest.skip(f"the demo model is missing: {path} (make demo-model)")
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    last = [report for report in reports if getattr(report, "when", None) == "teardown"]
    if figures := [text for report in last for name, text in report.user_properties if name == FIGURE]:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(figures))
