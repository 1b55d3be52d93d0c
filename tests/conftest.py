"""What every test gets: nothing of another test's logging set-up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def logging_of_its_own() -> Iterator[None]:
    """structlog is configured per process; a program under test that does so must not change the next test."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
