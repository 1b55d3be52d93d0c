"""A server that nobody can dial, reached through a bootstrap node; and when that node is gone for a while."""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from petalsd.swarm.identity import ensure_identity
from petalsd.swarm.node import RELAYED, Node, NodeOptions
from tests.daemon.processes import DaemonProcess
from tests.networks import Networks, missing, networks
from tests.swarm.servers import node
from tests.waiting import eventually

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(240),
]


# A bootstrap node that is down: libp2p would wait for it before it takes another relay.
_DEAD = "/ip4/1.2.3.20/tcp/31337/p2p/QmZRjeJbu1KXG6EfA1G7zXnad2JoYNQf6uQDjWAFuN7trL"


class Elsewhere(DaemonProcess):
    """In a network namespace of its own."""

    def __init__(self, command: list[str], name: str, home: Path, *overrides: str) -> None:
        super().__init__(name, home, *overrides)
        self._command = command

    async def start(self) -> None:
        await self.start_program()

    def _execute(self, output: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self._command, sys.executable, "-m", "petalsd", *self._words()],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environ(),
        )  # fmt: skip


@pytest.fixture(scope="module")
def nets() -> Iterator[Networks]:
    with networks() as made:
        yield made


@contextlib.asynccontextmanager
async def running(daemon: DaemonProcess, event: str) -> AsyncIterator[DaemonProcess]:
    try:
        await daemon.start()
        await daemon.event(event)
        yield daemon
    finally:
        await daemon.end()


def boot_in(nets: Networks, home: Path) -> tuple[DaemonProcess, str]:
    """A bootstrap node outside, and its address, the same in all its lives."""
    key, host = home / "boot.key", f"/ip4/{nets.outer_address}/tcp/31337"
    overrides = ("daemon.role=bootstrap", f"swarm.host_maddrs={host}", f"swarm.identity_path={key}")
    maddr = f"{host}/p2p/{ensure_identity(key)}"
    return Elsewhere(nets.inside(nets.outer), "boot", home, *overrides), maddr


def server_in(nets: Networks, home: Path, model_dir: Path, maddr: str) -> DaemonProcess:
    return Elsewhere(
        nets.inside(nets.inner), "server", home, f"model.source={model_dir}", "model.dtype=float32",
        "engine.device=cpu", "engine.kv_tokens=256", "engine.threads=1", "swarm.throughput=10",
        "blocks.join_delay_s=0.1", "blocks.span=0:4", f"swarm.initial_peers={_DEAD},{maddr}",
    )  # fmt: skip


async def test_it_is_announced_when_it_can_be_reached(
    nets: Networks, tmp_path: Path, model_dir: Path
) -> None:
    """Within seconds, and not before a relay has it. When the relay comes back after a death, the server does."""
    boot, maddr = boot_in(nets, tmp_path)
    server = server_in(nets, tmp_path, model_dir, maddr)
    async with running(boot, "bootstrap_node_started"), running(server, "online"):
        joined = await server.event("joined")
        assert joined["relayed"]
        assert any(maddr in one and RELAYED in one for one in joined["maddrs"])
        with nets.entered(nets.outer):
            async with node(NodeOptions(initial_peers=(maddr,), client_mode=True)) as client:
                await assert_reached(client, joined["peer_id"])
        at = len(server.events)
        boot.send(signal.SIGKILL)
        await boot.ended()
        again, _ = boot_in(nets, tmp_path)
        async with running(again, "bootstrap_node_started"):
            await server.event("joined", after=at)
            await server.event("online", after=at)
            with nets.entered(nets.outer):
                async with node(NodeOptions(initial_peers=(maddr,), client_mode=True)) as client:
                    await assert_reached(client, joined["peer_id"])


async def assert_reached(client: Node, peer_id: str) -> None:
    """It answers: at once, or as soon as its new address is known."""

    async def answers() -> bool:
        return math.isfinite(await client.ping(peer_id))

    await eventually(answers, timeout_s=30, interval_s=0.2)
