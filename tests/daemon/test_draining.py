"""Stopping a real daemon while a client is in the middle of a session."""

from __future__ import annotations

import signal

import pytest
import torch

from petalsd.errors import RemoteFailure
from petalsd.swarm.codec import DUMMY, DUMMY_INT64, pack_structure
from petalsd.swarm.directory import read_view
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import ServerState, make_chain
from petalsd.swarm.stub import InferenceStream, ServerStub
from petalsd.types import BlockSpan
from tests.daemon.processes import DaemonProcess, Launch

pytestmark = [pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(240)]

PREFIX = "tiny-hf"
SPAN = BlockSpan(0, 4)
ANSWER_S = 20


async def step(stream: InferenceStream, position: int) -> torch.Tensor:
    """One decode step of a session over the whole span; returns its answer."""
    metadata = {
        "max_length": 16, "start_from_position": position, "args_structure": pack_structure(3)
    }  # fmt: skip
    uid = make_chain(PREFIX, SPAN) if position == 0 else ""
    await stream.send(uid, [torch.ones(1, 1, 64), DUMMY, DUMMY_INT64], metadata)
    (answer,) = await stream.receive(ANSWER_S)
    return answer


async def serving(daemon: DaemonProcess, node: Node) -> tuple[ServerStub, InferenceStream]:
    """The daemon online, with one session that has done a step."""
    await daemon.start()
    stub = ServerStub(node, (await daemon.online())["peer_id"])
    stream = await stub.open_inference()
    assert (await step(stream, 0)).shape == (1, 1, 64)
    return stub, stream


async def test_a_drain_lets_sessions_finish_and_refuses_new_ones(launch: Launch, node: Node) -> None:
    """OFFLINE is stored at once, the open session goes on until its client ends it, a new one is refused."""
    daemon = launch("one", "blocks.span=0:4", "daemon.drain_deadline_s=60")
    stub, stream = await serving(daemon, node)
    daemon.send(signal.SIGTERM)
    await daemon.event("draining")
    view = await read_view(node, PREFIX, len(SPAN))
    assert [record.state for record in view.blocks[0].values()] == [ServerState.OFFLINE]
    refused = await stub.open_inference()
    with pytest.raises(RemoteFailure, match="stopping"):
        await step(refused, 0)
    refused.abort()
    assert (await step(stream, 1)).shape == (1, 1, 64)
    await stream.close()
    assert await daemon.ended() == 0
    assert not any(event["event"] == "drain_abandoned" for event in daemon.events)


async def test_an_abandoned_drain_tells_its_clients_why(launch: Launch, node: Node) -> None:
    """At the deadline the session that is still open gets the reason; the exit is clean all the same."""
    daemon = launch("one", "blocks.span=0:4", "daemon.drain_deadline_s=0.5")
    _, stream = await serving(daemon, node)
    daemon.send(signal.SIGTERM)
    with pytest.raises(RemoteFailure, match="drain reached its deadline"):
        await stream.receive(ANSWER_S)
    stream.abort()
    assert await daemon.ended() == 0
    assert (await daemon.event("drain_abandoned"))["sessions_and_passes"] == 1


async def test_a_second_signal_stops_at_once(launch: Launch, node: Node) -> None:
    """A drain that would take an hour ends with the second SIGTERM, exit 0."""
    daemon = launch("one", "blocks.span=0:4", "daemon.drain_deadline_s=3600")
    _, stream = await serving(daemon, node)
    daemon.send(signal.SIGTERM)
    await daemon.event("draining")
    daemon.send(signal.SIGTERM)
    assert await daemon.ended() == 0
    assert (await daemon.event("drain_abandoned"))["was_cut_short"]
    stream.abort()
