"""What every test gets: one thread for torch, and nothing of another test's logging set-up."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import structlog

# Read when torch is imported, here and in the processes that tests start. The models of the tests are tiny: more
# threads only wait for each other, and take the cores from the tests beside.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def logging_of_its_own() -> Iterator[None]:
    """structlog is configured per process; a program under test that does so must not change the next test."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
