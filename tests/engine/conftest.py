from __future__ import annotations

import pytest

from tests.engine.rig import TinyModel


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Four blocks of a tiny Llama."""
    return TinyModel(tmp_path_factory.mktemp("llama"))
