"""The environment, the client and the models that the interop tests share; without the first they are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop import stock
from tests.interop.models import Model, open_model, random_llama


@pytest.fixture(scope="session", autouse=True)
def petals_environment() -> None:
    if not stock.is_built():
        pytest.skip("stock Petals is missing: make test-interop builds its environment (.venv-petals)")


@pytest.fixture(scope="session")
def stock_client(
    petals_environment: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[stock.StockClient]:
    with stock.StockClient(tmp_path_factory.mktemp("stock-client") / "client.log") as client:
        yield client


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """4 blocks, grouped queries, hidden 64."""
    return random_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """2 blocks, hidden 512: 1024 tokens of it are more than the 1 MiB that one message may carry."""
    return random_llama(tmp_path_factory.mktemp("wide"), num_hidden_layers=2, hidden_size=512)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """SmolLM2-135M: 30 blocks, hidden 576."""
    directory = Path(os.environ.get("PETALSD_DEMO_MODEL", ".cache/demo-model")).absolute()
    if not (directory / "config.json").exists():
        pytest.skip(f"the demo model is not in {directory}: make demo-model converts it")
    return open_model(directory, tmp_path_factory.mktemp("demo"))
