"""A control server on a socket of its own, over a double of the daemon."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from petalsd.control.access import Access
from petalsd.control.operations import ServerOperations
from petalsd.control.server import ControlServer
from petalsd.control.socket_file import SocketFile
from petalsd.types import HostPort
from tests.control.double import DaemonDouble

METRICS = b"# TYPE petalsd_up gauge\npetalsd_up 1\n"
Make = Callable[..., ControlServer]


@pytest.fixture
def daemon() -> DaemonDouble:
    return DaemonDouble()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "petalsd" / "demo" / "control.sock"


@pytest.fixture
def make(daemon: DaemonDouble, path: Path) -> Make:
    """Constructs servers; whoever starts one stops it."""

    def server(metrics: HostPort | None = None, access: Access | None = None) -> ControlServer:
        who = access or Access(os.geteuid(), None, None)
        content_type = "text/plain; version=0.0.4"
        operations = ServerOperations(daemon, lambda: (METRICS, content_type))
        return ControlServer(operations, SocketFile(path, who), who, metrics)

    return server


@pytest.fixture
async def server(make: Make) -> AsyncIterator[ControlServer]:
    """One that listens, also for metrics."""
    server = make(HostPort("127.0.0.1", 0))
    await server.start()
    yield server
    await server.stop()
