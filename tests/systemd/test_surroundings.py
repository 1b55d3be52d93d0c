"""What the daemon cannot heal, a lost swarm and a full disk: said, lived with, and forgotten when it is over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from petalsd.client.runtime import ClientRuntime
from petalsd.swarm.node import Node, NodeOptions
from tests.systemd.clients import PROMPT, generate, greedy
from tests.systemd.conftest import MODEL, Figure, MakeInstance
from tests.systemd.instances import Instance
from tests.systemd.lab import Lab

pytestmark = [pytest.mark.systemd, pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(180)]

LOOK_S = 20.0  # how often the daemon looks around; an answer that does not come takes some seconds more
ANSWER_S = 15.0
DISK = "/var/lib/petalsd/member"
DISK_BYTES = 260 * 2**20  # more than what counts as almost full


class Bootstrap:
    """The first peer of a swarm: its address and its identity stay the same when it comes back."""

    def __init__(self, runtime: ClientRuntime, key: Path) -> None:
        self._runtime = runtime
        self._options = NodeOptions(identity_path=key, host_maddrs=("/ip4/127.0.0.1/tcp/4999",))
        self._node = Node(self._options)

    def start(self) -> str:
        """Its address."""
        self._node = Node(self._options)
        self._runtime.run(self._node.start())
        return self._runtime.run(self._node.visible_maddrs())[0]

    def stop(self) -> None:
        self._runtime.run(self._node.stop())


@pytest.fixture
def bootstrap(lab: Lab, tmp_path: Path) -> Iterator[Bootstrap]:
    with ClientRuntime() as runtime:
        bootstrap = Bootstrap(runtime, tmp_path / "key")
        yield bootstrap
        bootstrap.stop()


@pytest.fixture
def member(lab: Lab, bootstrap: Bootstrap, instance: MakeInstance) -> Iterator[Instance]:
    """A server that joins through the first peer; its state lives on a small disk of its own."""
    member = instance("member")
    member.configure(MODEL, swarm={"initial_peers": [bootstrap.start()]})
    lab.run(["mkdir", "-p", DISK])
    lab.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", DISK])
    member.start()
    yield member
    member.stop()


def test_a_lost_swarm_and_a_full_disk(
    lab: Lab,
    bootstrap: Bootstrap,
    member: Instance,
    tiny: PreTrainedModel,
    tiny_path: Path,
    figure: Figure,
) -> None:
    """Both at once: two warnings, clients are served as before; each is over by itself when its cause is."""
    maddr = member.ctl("status")["maddrs"][0]
    pid, since_s = member.pid, member.journal.mark()
    lab.run(["fallocate", "-l", str(DISK_BYTES - 2**20), f"{DISK}/ballast"])
    bootstrap.stop()
    lost = member.event("swarm_lost", since_s, LOOK_S + ANSWER_S)
    full = member.event("warning_raised", since_s, code="disk_full")
    figure("swarm lost: noticed after", lost.monotonic_s - since_s)
    figure("disk full: noticed after", full.monotonic_s - since_s)
    warnings = member.warnings()
    assert set(warnings) == {"swarm_unreachable", "disk_full"}
    assert f" MiB left in {DISK}" in warnings["disk_full"]
    assert generate(tiny_path, maddr) == greedy(tiny, PROMPT, 8)

    lab.run(["rm", f"{DISK}/ballast"])
    bootstrap.start()
    back_s = time.monotonic()
    found = member.event("swarm_found", back_s)
    figure("swarm found again after its peer is back", found.monotonic_s - back_s)
    member.event("warning_cleared", since_s, code="swarm_unreachable")
    member.event("warning_cleared", since_s, code="disk_full")
    assert member.warnings() == {}
    assert member.pid == pid
