"""Other users on the real socket: they read, they do not act, and they cannot keep the administrator out."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from petalsd.control.access import Access, Peer
from petalsd.control.connection import MAX_CONNECTIONS, MAX_CONNECTIONS_PER_READER, ConnectionLimits
from petalsd.control.server import ControlServer
from petalsd.control.socket_file import SocketFile
from tests.control.conftest import Make
from tests.control.double import Answer, DaemonDouble, ask, parse

NOBODY = 65534
GROUP = grp.getgrgid(1)  # a group that every system has, and that is nobody's own

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("curl") is None, reason="needs root and curl, to be somebody else"
)


@pytest.fixture
def path() -> Iterator[Path]:
    """Where every user can go, unlike pytest's own directories."""
    directory = Path(tempfile.mkdtemp(prefix="petalsd-"))
    directory.chmod(0o755)
    yield directory / "control.sock"
    shutil.rmtree(directory)


@pytest.fixture
async def server(make: Make) -> AsyncIterator[ControlServer]:
    server = make(access=Access(os.geteuid(), GROUP.gr_name, GROUP.gr_gid))
    await server.start()
    yield server
    await server.stop()


async def ask_as(groups: list[int], path: Path, target: str, *options: str) -> Answer:
    """A request of a process that is nobody, with these supplementary groups."""
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "-i", "--max-time", "20", "--unix-socket", str(path), *options, f"http://x{target}",
        stdout=asyncio.subprocess.PIPE, user=NOBODY, group=NOBODY, extra_groups=groups,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    return parse(output)


@needs_root
async def test_everybody_reads(server: ControlServer, path: Path) -> None:
    for target in ("/v1/status", "/v1/sessions", "/v1/peers", "/v1/version", "/metrics", "/livez", "/readyz"):
        assert (await ask_as([], path, target)).status == 200


@needs_root
@pytest.mark.parametrize("target", ["/v1/drain", "/v1/resume", "/v1/rebalance", "/v1/reload"])
async def test_not_everybody_acts(
    target: str, server: ControlServer, daemon: DaemonDouble, path: Path
) -> None:
    """The refusal comes before the body is looked at, and names who may."""
    answer = await ask_as([], path, target, "-d", "{not even json")
    assert answer.status == 403
    assert answer.json["error"]["code"] == "forbidden"
    assert f"the group {GROUP.gr_name}" in answer.json["error"]["message"]
    assert answer.json["error"]["acting_group"] == GROUP.gr_name
    assert daemon.acts == []


@needs_root
async def test_members_of_the_group_act(server: ControlServer, daemon: DaemonDouble, path: Path) -> None:
    body = json.dumps({"deadline_s": 1})
    assert (await ask_as([GROUP.gr_gid], path, "/v1/drain", "-d", body)).status == 200
    assert daemon.acts == [("drain", 1.0)]


@needs_root
def test_the_file_shows_which_group(path: Path) -> None:
    """So that who may not act sees which one to join."""
    with SocketFile(path, Access(os.geteuid(), GROUP.gr_name, GROUP.gr_gid)).open():
        assert path.stat().st_gid == GROUP.gr_gid


def test_readers_cannot_take_all_connections() -> None:
    """One user that may only read gets a part of them; root gets in as long as there is any."""
    limits = ConnectionLimits(lambda peer: peer.uid == 0)
    reader, other, root = (Peer(1, uid, frozenset()) for uid in (1000, 1001, 0))
    assert [limits.enter(reader) for _ in range(MAX_CONNECTIONS_PER_READER + 1)].count(True) == (
        MAX_CONNECTIONS_PER_READER
    )
    assert limits.enter(other)
    limits.leave(reader)
    assert limits.enter(reader)
    taken = MAX_CONNECTIONS_PER_READER + 1
    assert [limits.enter(root) for _ in range(MAX_CONNECTIONS)].count(True) == MAX_CONNECTIONS - taken


async def test_the_own_user_acts(server: ControlServer, daemon: DaemonDouble, path: Path) -> None:
    assert (await ask(path, "POST", "/v1/resume")).status == 200
    assert daemon.acts == [("resume", None)]
