"""A model over two servers in memory, whose streams end with it, and its oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from petalsd.client.model import RemoteCausalLM
from petalsd.client.runtime import ClientRuntime
from tests.client.fake_model import FakeClient, LocalModel, make_config, make_head
from tests.client.fake_swarm import FakeServer, FakeSwarm, make_span


@pytest.fixture
def swarm() -> FakeSwarm:
    return FakeSwarm(FakeServer(make_span("a", 0, 3)), FakeServer(make_span("b", 3, 6)))


@pytest.fixture
def model(swarm: FakeSwarm) -> Iterator[RemoteCausalLM]:
    runtime = ClientRuntime()
    runtime.start()
    with RemoteCausalLM(make_config(), make_head(), runtime, FakeClient(swarm)) as model:
        yield model
    assert not runtime.is_running
    assert swarm.open_streams == 0


@pytest.fixture
def local() -> LocalModel:
    return LocalModel().eval()
