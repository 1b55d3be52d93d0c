"""Nodes on loopback: joining, storing, pinging, and the death of p2pd and of ourselves."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from petalsd.errors import DeadlineExceeded, SwarmError
from petalsd.swarm.directory import read_view
from petalsd.swarm.identity import ensure_identity
from petalsd.swarm.node import Node, NodeOptions, dialable
from petalsd.swarm.p2pd import P2PDOptions, child_environment
from petalsd.swarm.protocol import ServerState, make_uid
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan
from tests.daemon.processes import is_running
from tests.swarm.servers import joining, node
from tests.waiting import eventually

NOBODY = "12D3KooWPPYTbCekn58DYPfnN3EpyNH2Y4LAnCUmRmTCwXsU74EX"
RECORD = ServerRecord(ServerState.ONLINE, 10.0, BlockSpan(0, 2))


@pytest.mark.swarm
async def test_records_written_by_one_node_are_read_by_another() -> None:
    """Stored under our PeerID, latest first, expired ones gone."""
    async with node() as first, node(await joining(first, client_mode=True)) as client:
        uids = [make_uid("m", block) for block in range(2)]
        soon = time.time() + 60
        assert await first.store(uids, first.peer_id, RECORD.to_wire(), soon, 10) == []
        assert await first.store(uids, first.peer_id, RECORD.to_wire(), soon - 1, 10) == uids
        view = await read_view(client, "m", 3, timeout_s=10)
        assert [(remote.peer, str(remote.span)) for remote in view.spans()] == [(first.peer_id, "0:2")]
        assert view.missing_blocks() == [2]
        assert await client.get([], timeout_s=10) == {}


@pytest.mark.swarm
async def test_a_value_that_is_no_msgpack_breaks_no_lookup() -> None:
    """Bytes that hivemind cannot unpack would end its search without an answer; here the rest is read."""
    async with node() as first, node(await joining(first, client_mode=True)) as client:
        soon = time.time() + 60
        await first.store(["m.0"], first.peer_id, RECORD.to_wire(), soon, 10)
        assert first.dht.protocol.storage.store(
            DHTID.generate("m.0"), b"\xc1", soon + 1, subkey="Qm" + "x" * 44
        )
        view = await read_view(client, "m", 1, timeout_s=10)
        assert list(view.blocks[0]) == [first.peer_id]


@pytest.mark.swarm
async def test_pings_tell_the_living_from_the_dead() -> None:
    """A server answers, a client that serves no DHT lives too, an unknown peer is infinitely far."""
    async with node() as first, node(await joining(first, client_mode=True)) as client:
        assert 0 < await client.ping(first.peer_id) < 5
        assert 0 < await first.ping(client.peer_id) < 5
        assert await client.ping(NOBODY, timeout_s=0.5) == math.inf
        assert await client.ping("nonsense") == math.inf


@pytest.mark.swarm
async def test_an_identity_is_kept_and_held(tmp_path: Path) -> None:
    """The node's PeerID is the key file's, and a second node with it is refused."""
    options = NodeOptions(identity_path=tmp_path / "identity.key")
    async with node(options) as first:
        assert first.peer_id == ensure_identity(tmp_path / "identity.key")
        (maddr,) = await first.visible_maddrs()
        assert maddr.startswith("/ip4/127.0.0.1/tcp/") and maddr.endswith(f"/p2p/{first.peer_id}")
        with pytest.raises(SwarmError, match="in use by another process"):
            await Node(options).start()
    async with node(options) as again:
        assert again.peer_id == ensure_identity(tmp_path / "identity.key")


@pytest.mark.swarm
async def test_initial_peers_that_are_not_there_are_named() -> None:
    """Joining fails with the peers' addresses and leaves no process behind."""
    nowhere = f"/ip4/127.0.0.1/tcp/9/p2p/{NOBODY}"
    lonely = Node(NodeOptions(initial_peers=(nowhere,), dht_timeout_s=1.0))
    with pytest.raises(SwarmError, match="cannot join the swarm through /ip4/127"):
        await lonely.start()
    with pytest.raises(SwarmError, match="not started"):
        _ = lonely.peer_id


@pytest.mark.swarm
async def test_an_address_that_cannot_be_listened_on_is_reported() -> None:
    """p2pd's own last words are in the error."""
    with pytest.raises(SwarmError, match="libp2p daemon did not start"):
        await Node(NodeOptions(host_maddrs=("/ip4/203.0.113.1/tcp/1",))).start()


@pytest.mark.swarm
async def test_a_port_that_is_taken_is_called_that() -> None:
    """With a way to see who has it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        maddr = f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"
        with pytest.raises(SwarmError, match=r"already in use.*`ss -ltnup` shows .* swarm.host_maddrs"):
            await Node(NodeOptions(host_maddrs=(maddr,))).start()


@pytest.mark.swarm
async def test_two_nodes_of_one_user_do_not_share_a_port() -> None:
    """libp2p would, and half of those who dial would find the other one; the port is free again afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = NodeOptions(host_maddrs=(f"/ip4/127.0.0.1/tcp/{port}",))
    everywhere = NodeOptions(host_maddrs=(f"/ip4/0.0.0.0/tcp/{port}", f"/ip4/127.0.0.1/tcp/{port}"))
    async with node(options):
        for second in (options, everywhere):
            with pytest.raises(SwarmError, match="already in use"):
                await Node(second).start()
    rivals = [Node(options), Node(options)]
    outcomes = await asyncio.gather(*(rival.start() for rival in rivals), return_exceptions=True)
    for rival in rivals:
        await rival.stop()
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "SwarmError"]
    async with node(everywhere):
        pass


@pytest.mark.swarm
async def test_the_death_of_p2pd_is_noticed() -> None:
    """until_failed returns with the reason, and the node can still be stopped."""
    async with node() as broken:
        failing = asyncio.create_task(broken.until_failed())
        await asyncio.sleep(0)
        os.kill(_child(broken), signal.SIGKILL)
        async with asyncio.timeout(10):
            assert "libp2p daemon" in await failing
        with pytest.raises(SwarmError, match="libp2p daemon is gone"):
            await broken.visible_maddrs()


@pytest.mark.swarm
async def test_a_stop_that_is_cancelled_leaves_no_daemon_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the process is told to end while it makes a broken node anew: nobody would stop it again."""

    async def hang(self: DHTNode) -> None:
        await asyncio.sleep(60)

    started = Node(NodeOptions())
    await started.start()
    monkeypatch.setattr(DHTNode, "shutdown", hang)
    stopping = asyncio.create_task(started.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    assert stopping.cancelled() and not started._daemon.is_alive


@pytest.mark.swarm
async def test_a_node_without_its_daemon_is_left_at_once() -> None:
    """Nothing waits for answers that cannot come: healing begins with taking the broken node down."""
    async with node() as broken:
        failing = asyncio.create_task(broken.until_failed())
        await asyncio.sleep(0)
        os.kill(_child(broken), signal.SIGKILL)
        await failing
        with pytest.raises(SwarmError, match="the libp2p daemon is gone"):
            _ = broken.p2p
        assert broken.peer_id
        dht = broken.dht
        async with asyncio.timeout(1.0):
            await broken.stop()
        assert not dht.is_alive


@pytest.mark.swarm
async def test_a_stopped_daemon_ends_when_it_is_told_to() -> None:
    """SIGTERM alone stays pending at a stopped process; the DHT gets its deadline for a farewell, and no more."""
    async with node() as wedged:
        child = _child(wedged)
        os.kill(child, signal.SIGSTOP)
        async with asyncio.timeout(1.5):
            await wedged.stop(deadline_s=0.5)
        assert not is_running(child)


@pytest.mark.swarm
@pytest.mark.parametrize("is_known", [True, False], ids=["remembered", "forgotten"])
async def test_a_node_that_lost_everybody_finds_them_again(tmp_path: Path, is_known: bool) -> None:
    """Out of touch while the only peer is away, whoever asks; in touch again when it is back at its address.

    The DHT forgets peers that do not answer: then the address from the configuration is all there is.
    """
    options = NodeOptions(identity_path=tmp_path / "key")
    first = Node(options)
    await first.start()
    (maddr,) = await first.visible_maddrs()
    async with node(await joining(first)) as other:
        assert await other.is_in_touch()
        await first.stop()
        assert not await other.is_in_touch()
        if not is_known:
            table = other.dht.protocol.routing_table
            del table[table.peer_id_to_uid[PeerID.from_base58(maddr.rpartition("/")[2])]]
        here = maddr.partition("/p2p/")[0]
        again = Node(replace(options, host_maddrs=(here,)))
        await again.start()
        await eventually(other.is_in_touch, timeout_s=30, interval_s=0.2)  # libp2p dials again after seconds
        await again.stop()


@pytest.mark.swarm
@pytest.mark.parametrize("client_mode", [True, False], ids=["client", "server"])
async def test_a_node_that_forgot_everybody_reads_on(client_mode: bool) -> None:
    """The DHT forgets who leaves one request unanswered for three seconds, as a busy peer may. A client has nobody
    who would make itself known again: it read nothing for the rest of its life.
    """
    async with node() as first, node(await joining(first, client_mode=client_mode)) as other:
        expiration = time.time() + 60
        assert await first.store(["key"], "subkey", 1, expiration, 10) == []
        protocol = other.dht.protocol
        for peer_id, node_id in list(protocol.routing_table.peer_id_to_uid.items()):
            await protocol.update_routing_table(node_id, peer_id, responded=False)
        assert other.known_peers() == []
        assert "subkey" in (await other.get(["key"], 10))["key"]
        assert other.known_peers() == [first.peer_id]


def test_addresses_reach_libp2p_in_its_own_form() -> None:
    """hivemind packs peers into addresses as libp2p does not read them: the last is left out, a relay packed."""
    assert dialable(f"/ip4/127.0.0.1/tcp/4000/p2p/{NOBODY}").to_bytes() == bytes.fromhex("047f000001060fa0")
    relayed = dialable(f"/ip4/127.0.0.1/tcp/4000/p2p/{NOBODY}/p2p-circuit/p2p/{NOBODY}").to_bytes()
    peer = PeerID.from_base58(NOBODY).to_bytes()
    circuit = bytes.fromhex("a202")
    assert relayed == bytes.fromhex("047f000001060fa0 a503") + bytes([len(peer)]) + peer + circuit


@pytest.mark.swarm
async def test_a_lookup_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DHT that does not answer ends in DeadlineExceeded."""

    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    async with node() as first:
        monkeypatch.setattr(DHTNode, "get_many", never)
        with pytest.raises(DeadlineExceeded, match=r"reading in the DHT took longer than 0\.05 s"):
            await first.get(["m.0"], timeout_s=0.05)


LIVES = """
import asyncio, sys, uvloop
from petalsd.swarm.node import Node, NodeOptions, dialable
async def main():
    node = Node(NodeOptions())
    await node.start()
    print(node._daemon._child.pid, flush=True)
    await asyncio.Event().wait()
uvloop.run(main())
"""


@pytest.mark.swarm
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_p2pd_dies_with_us_and_not_before(number: signal.Signals) -> None:
    """A process killed outright takes p2pd along; p2pd is no member of the group that Ctrl-C reaches."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", LIVES],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        p2pd = next(int(line) for line in process.stdout if line.strip().isdigit())
        assert os.getpgid(p2pd) != process.pid
        os.kill(process.pid, number)
        process.wait(timeout=20)
        _wait_gone(p2pd)


@pytest.mark.swarm
def test_everything_runs_in_uvloop() -> None:
    """Two nodes start, talk and stop under the loop that the daemon uses."""

    async def talk() -> float:
        async with node() as first, node(await joining(first)) as second:
            return await second.ping(first.peer_id)

    assert 0 < uvloop.run(talk()) < 5


def test_the_daemon_is_told_only_what_was_asked() -> None:
    """Flags follow the options; loopback asks no router for a port, a probe listens nowhere."""
    flags = P2PDOptions(client_mode=True, listen=False, use_relay=False).arguments(Path("/run/s"))
    assert {"-dhtClient=1", "-noListenAddrs=1", "-relay=0", "-natPortMap=0", "-b=0"} <= set(flags)
    assert not any(flag.startswith(("-hostAddrs", "-bootstrapPeers", "-id=", "-dhtServer")) for flag in flags)
    public = P2PDOptions(initial_peers=("/a", "/b"), host_maddrs=("/ip4/0.0.0.0/tcp/1",)).arguments(
        Path("/run/s")
    )
    assert {"-bootstrapPeers=/a,/b", "-hostAddrs=/ip4/0.0.0.0/tcp/1", "-natPortMap=1", "-b=1"} <= set(public)


@pytest.mark.parametrize(("num_cores", "expected"), [(1, "1"), (2, "1"), (3, "1"), (8, "4")])
def test_the_daemon_gets_half_of_the_cores_and_no_secrets(num_cores: int, expected: str) -> None:
    """Whoever sets GOMAXPROCS is obeyed."""
    ours = {"PATH": "/bin", "HF_TOKEN": "secret", "NOTIFY_SOCKET": "/run/n"}
    given = child_environment(ours, num_cores)
    assert given["GOMAXPROCS"] == expected
    assert set(given) == {"PATH", "GOMAXPROCS", "GOLOG_LOG_LEVEL", "GOLOG_LOG_FMT"}
    assert child_environment({**ours, "GOMAXPROCS": "7"}, num_cores)["GOMAXPROCS"] == "7"


def _child(running: Node) -> int:
    child = running._daemon._child
    assert child is not None
    return child.pid


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while _is_alive(pid):
        assert time.monotonic() < deadline, "p2pd outlived its parent"
        time.sleep(0.02)
