"""The control socket of a bootstrap node: as every daemon's, and a reason for what only servers do."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from petalsd.control.access import Access
from petalsd.control.bootstrap_operations import BootstrapOperations
from petalsd.control.operations import ServerOperations
from petalsd.control.server import ControlServer
from petalsd.control.socket_file import SocketFile
from tests.control.conftest import METRICS
from tests.control.double import DaemonDouble, ask


@pytest.fixture
async def node(daemon: DaemonDouble, path: Path) -> AsyncIterator[ControlServer]:
    who = Access(os.geteuid(), None, None)
    operations = BootstrapOperations(daemon, lambda: (METRICS, "text/plain"))
    server = ControlServer(operations, SocketFile(path, who), who, None)
    await server.start()
    yield server
    await server.stop()


async def test_what_every_daemon_answers(node: ControlServer, path: Path) -> None:
    for target in ("/v1/status", "/v1/peers", "/v1/version", "/metrics", "/livez", "/readyz"):
        assert (await ask(path, "GET", target)).status == 200
    assert (await ask(path, "POST", "/v1/reload", b"{}")).status == 200


async def test_what_servers_do_is_refused_with_the_reason(
    node: ControlServer, daemon: DaemonDouble, path: Path
) -> None:
    """No path that a server has is simply missing."""
    others = BootstrapOperations(daemon, lambda: (b"", "")).routes()
    servers = ServerOperations(daemon, lambda: (b"", "")).routes()
    assert set(servers) == set(others)
    for method, target in [("GET", "/v1/sessions"), ("POST", "/v1/drain"), ("POST", "/v1/rebalance")]:
        answer = await ask(path, method, target, b"{}" if method == "POST" else b"")
        assert answer.status == 409
        assert answer.json["error"]["message"] == (
            f"{target}: this is a bootstrap node, which serves no blocks and has no sessions"
        )
