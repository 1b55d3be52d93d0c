"""Real daemons with a tiny model, and a node of the test's own that they join through."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from petalsd.swarm.node import Node, NodeOptions
from tests.daemon.processes import DaemonProcess
from tests.tiny_models import make_tiny

Launch = Callable[..., DaemonProcess]


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
    daemons: list[DaemonProcess] = []
    maddr = (await node.visible_maddrs())[0]

    def make(name: str, *overrides: str) -> DaemonProcess:
        daemon = DaemonProcess(
            name, tmp_path, f"model.source={model_dir}", "model.dtype=float32", "engine.device=cpu",
            "engine.kv_tokens=256", "engine.threads=1", "swarm.throughput=10", f"swarm.initial_peers={maddr}",
            "swarm.host_maddrs=/ip4/127.0.0.1/tcp/0", "blocks.join_delay_s=0.1", *overrides,
        )  # fmt: skip
        daemons.append(daemon)
        return daemon

    yield make
    for daemon in daemons:
        await daemon.end()
