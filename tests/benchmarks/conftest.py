"""A small model, and servers that the smoke tests of one file share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.providers import Fleet
from tests.tiny_models import make_tiny


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of three blocks: a server of two of them can move."""
    path = tmp_path_factory.mktemp("model")
    make_tiny("llama", path, num_hidden_layers=3)
    return path


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet() as fleet:
        yield fleet
