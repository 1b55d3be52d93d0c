"""Real daemons with a tiny model, and a node of the test's own that they join through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from petalsd.swarm.node import Node, NodeOptions
from tests.daemon.processes import Launch, launching
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("llama", path)
    return path


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    """The test's own place in the swarm: daemons join through it, and it outlives them."""
    node = Node(NodeOptions())
    await node.start()
    yield node
    await node.stop()


@pytest.fixture
async def launch(tmp_path: Path, node: Node, model_dir: Path) -> AsyncIterator[Launch]:
    """Makes daemons that join the test's node; ends them all."""
    async with launching(tmp_path, node, model_dir) as make:
        yield make
