"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.rig import Gate, TinyModel


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Four blocks of a tiny Llama."""
    return TinyModel(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Holds the engine thread where it is hooked in; open at the end of the test whatever happens."""
    gate = Gate()
    yield gate
    gate.opened.set()
