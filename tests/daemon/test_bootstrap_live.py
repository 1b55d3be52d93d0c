"""A real bootstrap node as a process: asked by the real petalsctl, joined by a real server, killed and back."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import jsonschema
import pytest

from petalsd.status_schemas import schema_of
from petalsd.swarm.node import Node, NodeOptions
from tests.control.double import ask
from tests.daemon.processes import DaemonProcess, Launch, child_pids
from tests.daemon.test_control_live import Ctl
from tests.swarm.servers import node
from tests.waiting import eventually

pytestmark = pytest.mark.swarm


@pytest.fixture
def maddr() -> str:
    """Where it listens: others have it in their files, so that it stays the same."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}"


@pytest.fixture
async def boot(tmp_path: Path, maddr: str) -> AsyncIterator[DaemonProcess]:
    daemon = DaemonProcess("boot", tmp_path, "daemon.role=bootstrap", f"swarm.host_maddrs={maddr}")
    await daemon.start()
    await daemon.event("bootstrap_node_started")
    yield daemon
    await daemon.end()


@pytest.fixture
def ctl(boot: DaemonProcess) -> Ctl:
    return Ctl(Path(next(event["path"] for event in boot.events if event["event"] == "control_socket_open")))


async def test_a_server_joins_through_it_and_finds_it_again(
    boot: DaemonProcess, ctl: Ctl, launch: Launch, tmp_path: Path, maddr: str
) -> None:
    """It lists the model that the server announces, outlives a libp2p daemon, and comes back after a kill."""
    await ctl("wait", "--ready")
    status = await ctl.json("status")
    jsonschema.validate(status, schema_of("bootstrap-status"))
    address = f"{maddr}/p2p/{status['peer_id']}"
    assert status["maddrs"] == [address]

    server = launch("one", "blocks.span=0:2", f"swarm.initial_peers={address}")
    await server.start()
    await server.online()
    swarm = await ctl.json("peers")
    jsonschema.validate(swarm, schema_of("bootstrap-peers"))
    (model,) = swarm["models"]
    assert (model["num_blocks"], model["uncovered"]) == (4, [{"start": 2, "end": 4}])
    assert [peer["span"] for peer in model["peers"]] == [{"start": 0, "end": 2}]
    assert "nobody serves blocks 2:4" in await ctl("peers")
    readings = (await ctl("metrics")).splitlines()
    assert "petalsd_dht_known_peers 1.0" in readings
    assert 'petalsd_rebalances_total{cause="member_broken"} 0.0' in readings  # or the first one were no rise
    assert any(line.startswith("petalsd_dht_stored_keys ") and not line.endswith(" 0.0") for line in readings)

    at = len(boot.events)
    os.kill(child_pids(boot.pid)[0], signal.SIGKILL)
    await boot.event("bootstrap_node_started", after=at)
    await ctl("wait", "--ready")
    assert 'petalsd_rebalances_total{cause="member_broken"} 1.0' in await ctl("metrics")

    boot.send(signal.SIGKILL)
    await boot.ended()
    again = DaemonProcess("boot", tmp_path, *boot.overrides)
    try:
        await again.start()
        await again.event("bootstrap_node_started")
        async with node(NodeOptions(initial_peers=(address,))) as client:
            await eventually(lambda: knows(client, server), timeout_s=60, interval_s=0.2)
    finally:
        await again.end()


async def test_what_servers_do_is_refused_and_a_reload_is_not(boot: DaemonProcess, ctl: Ctl) -> None:
    await ctl("wait", "--ready")
    assert "this is a bootstrap node, which serves no blocks" in await ctl("drain", status=4)
    assert "this is a bootstrap node" in await ctl("sessions", status=4)
    assert "as it was" in await ctl("reload")
    at = len(boot.events)
    boot.send(signal.SIGHUP)  # only the log can tell who sent it that the file was right
    await boot.event("reloaded", after=at)
    assert (await ask(ctl.socket, "GET", "/readyz")).status == 200
    boot.send(signal.SIGTERM)
    assert await boot.ended() == 0
    assert boot.events[-1]["event"] == "stopped"


async def knows(client: Node, server: DaemonProcess) -> bool:
    """Whether the server's peer can be found by somebody who knows the bootstrap node alone."""
    peer_id = next(event["peer_id"] for event in server.events if event["event"] == "online")
    return peer_id in client.known_peers() or await client.ping(peer_id, timeout_s=2) < 2
