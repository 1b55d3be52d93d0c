"""Real daemons on loopback with a tiny model: start, stop, reload, healing, and filling a gap."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from petalsd.swarm.directory import SwarmView, read_view
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import ServerState
from tests.daemon.processes import Launch, child_pids, is_running

pytestmark = [pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(240)]

NUM_BLOCKS = 4
PREFIX = "tiny-hf"


async def states(node: Node) -> dict[int, dict[str, ServerState]]:
    view = await read_view(node, PREFIX, NUM_BLOCKS)
    return {
        block: {peer: record.state for peer, record in records.items()}
        for block, records in enumerate(view.blocks)
    }


async def until_view(node: Node, condition: Callable[[SwarmView], bool]) -> SwarmView:
    """Read the directory until it looks as wanted."""
    async with asyncio.timeout(60):
        while True:
            view = await read_view(node, PREFIX, NUM_BLOCKS)
            if condition(view):
                return view
            await asyncio.sleep(0.1)


async def test_start_serve_and_stop(launch: Launch, node: Node) -> None:
    """The online event comes when the record is stored; SIGTERM ends with OFFLINE stored and exit 0."""
    daemon = launch(
        "one", "blocks.span=1:3", "swarm.public_name=test", "model.quantization=int4", "swarm.throughput=auto"
    )
    await daemon.start_program()
    online = await daemon.online()
    peer = online["peer_id"]
    assert online["span"] == "1:3"
    assert online["maddrs"][0].endswith(f"/p2p/{peer}")
    view = await read_view(node, PREFIX, NUM_BLOCKS)
    assert [sorted(records) for records in view.blocks] == [[], [peer], [peer], []]
    record = view.blocks[1][peer]
    assert (record.state, str(record.span)) == (ServerState.ONLINE, "1:3")
    *_, known = [event for event in daemon.events if event["event"] == "throughput_known"]
    assert (known["source"], known["network_source"]) == ("served", "assumed")
    rates = (record.inference_rps, record.forward_rps, record.network_rps)
    assert rates == (known["inference_rps"], known["forward_rps"], 100e6 / (16 * 64))
    assert record.throughput == min(known["forward_rps"] / 1.5, 100e6 / (16 * 64))
    assert (record.public_name, record.torch_dtype, record.using_relay) == ("test", "float32", False)
    assert record.quant_type == "int4"
    assert record.cache_tokens_left == 2 * 2 * 256  # K and V, two blocks
    children = child_pids(daemon.pid)
    daemon.send(signal.SIGTERM)
    assert await daemon.ended() == 0
    assert (await states(node))[1] == {peer: ServerState.OFFLINE}
    assert not any(is_running(child) for child in children)


async def test_a_restart_keeps_the_identity(launch: Launch, node: Node) -> None:
    """A second life has the same PeerID, and its records replace those of a first one that was killed."""
    first = launch("one", "blocks.span=0:2")
    await first.start()
    peer = (await first.online())["peer_id"]
    first.send(signal.SIGKILL)
    await first.ended()
    second = launch("one", "blocks.span=1:4")
    await second.start()
    assert (await second.online())["peer_id"] == peer
    found = await states(node)
    assert [found[block][peer].name for block in range(NUM_BLOCKS)] == [
        "OFFLINE",
        "ONLINE",
        "ONLINE",
        "ONLINE",
    ]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_broken_p2pd_is_replaced_in_the_same_process(
    launch: Launch, node: Node, blow: signal.Signals
) -> None:
    """A child that died or hangs gets a successor; the same PeerID is announced again, the process lives on."""
    daemon = launch("one", "blocks.span=0:4", "blocks.balance_period_s=1")
    await daemon.start()
    first = await daemon.online()
    seen = len(daemon.events)
    (child,) = child_pids(daemon.pid)
    os.kill(child, blow)
    second = await daemon.event("online", after=seen)
    assert second["peer_id"] == first["peer_id"]
    assert second["maddrs"] != first["maddrs"]
    found = await states(node)
    assert [found[block][first["peer_id"]] for block in range(NUM_BLOCKS)] == [
        ServerState.ONLINE
    ] * NUM_BLOCKS
    daemon.send(signal.SIGTERM)
    assert await daemon.ended() == 0


async def test_reload(launch: Launch, tmp_path: Path) -> None:
    """SIGHUP: a broken file changes nothing and says where it is wrong; a new span is moved to at once."""
    file = tmp_path / "one.toml"
    file.write_text('[blocks]\nspan = "0:2"\n')
    daemon = launch("one")
    await daemon.start()
    await daemon.online()
    file.write_text("[blocks]\nspam = 3\n")
    daemon.send(signal.SIGHUP)
    refused = await daemon.event("reload_refused")
    assert f"{file}: unknown key blocks.spam; did you mean blocks.span?" in refused["error"]
    file.write_text('[blocks]\nspan = "0:2"\nbalance_period_s = 45\n')
    daemon.send(signal.SIGHUP)
    assert (await daemon.event("reloaded"))["applied"] == ["blocks.balance_period_s"]
    await daemon.event("placement_unchanged")
    seen = len(daemon.events)
    file.write_text('[blocks]\nspan = "1:4"\n')
    daemon.send(signal.SIGHUP)
    assert (await daemon.event("online", after=seen))["span"] == "1:4"
    assert (await daemon.event("span_loaded", after=seen))["kept_blocks"] == 1
    daemon.send(signal.SIGTERM)
    assert await daemon.ended() == 0


async def test_a_stop_while_starting_exits_0(launch: Launch, node: Node) -> None:
    """SIGTERM before the first announcement: nothing was said, nothing is left, exit 0."""
    daemon = launch("one", "blocks.count=2", "blocks.join_delay_s=1000")
    await daemon.start_program()
    await daemon.event("joined")
    daemon.send(signal.SIGTERM)
    assert await daemon.ended() == 0
    assert all(records == {} for records in (await states(node)).values())


async def test_what_cannot_be_served_ends_with_a_reason(launch: Launch) -> None:
    """A span outside the model is a configuration error: the log says why, exit 78."""
    daemon = launch("one", "blocks.span=0:9")
    await daemon.start()
    assert "has the blocks 0:4" in (await daemon.event("failed"))["error"]
    assert await daemon.ended() == 78


async def test_three_daemons_fill_a_gap(launch: Launch, node: Node) -> None:
    """Two daemons cover the model, a third doubles; when the only server of a half is killed, another moves in.

    The dead one's records live for four minutes: pings show sooner that nobody renews them.
    """
    fast = ("blocks.count=2", "blocks.balance_period_s=1")
    daemons = [launch(name, *fast) for name in ("one", "two", "three")]
    spans, peers = [], []
    for daemon in daemons:
        await daemon.start()
        online = await daemon.online()
        spans.append(online["span"])
        peers.append(online["peer_id"])
    assert sorted(spans[:2]) == ["0:2", "2:4"]
    lonely = next(index for index in (0, 1) if spans[index] != spans[2])
    gap, dead, victim = spans[lonely], peers[lonely], daemons.pop(lonely)
    seen = [len(daemon.events) for daemon in daemons]
    victim.send(signal.SIGKILL)
    await victim.ended()
    moving = [
        asyncio.create_task(daemon.event("moved", after=after, matching=lambda event: event["new"] == gap))
        for daemon, after in zip(daemons, seen, strict=True)
    ]
    done, _ = await asyncio.wait(moving, return_when=asyncio.FIRST_COMPLETED)
    for task in moving:
        task.cancel()
    await asyncio.gather(*moving, return_exceptions=True)
    assert all(task.exception() is None for task in done)
    await until_view(node, lambda view: view.without({dead}).missing_blocks() == [])
