"""A real daemon moves, then stops, under eight sessions: none of them is lost, and none is fed again."""

from __future__ import annotations

import asyncio
import signal
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petalsd.client.options import ClientOptions
from petalsd.client.routing import Hop
from petalsd.client.session import InferenceSession
from petalsd.client.span_session import StreamTerms
from petalsd.swarm.directory import RemoteSpan
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.swarm.stub import ServerStub
from petalsd.types import BlockSpan
from tests.daemon.processes import DaemonProcess, Launch
from tests.daemon.test_control_live import Ctl
from tests.engine.rig import states
from tests.numeric import assert_close
from tests.reference_layers import through_layers
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(240)]

PREFIX = "tiny-hf"
STAYING, LEAVING = BlockSpan(1, 2), BlockSpan(0, 2)
PROMPT, END = 8, 24


class OnlyTo:
    """Routes to one server; a failure of it would be a replay, which these tests forbid."""

    def __init__(self, peer: str, span: BlockSpan) -> None:
        record = ServerRecord(ServerState.ONLINE, 1.0, span, version="petalsd")
        self._server = RemoteSpan(peer, span, record)

    def route_session(self, blocks: BlockSpan, max_tokens: int) -> list[Hop]:
        return [Hop(self._server, blocks)]

    async def refresh(self) -> None:
        """There is nothing to read."""

    def report_failure(self, peer: str) -> None:
        raise AssertionError(f"{peer} failed")

    def report_success(self, peer: str) -> None:
        """As it should be."""


class Decoder:
    """A session that decodes the same tokens again and again, and checks each round of them."""

    def __init__(self, session: InferenceSession, expected: torch.Tensor, hidden: torch.Tensor) -> None:
        self.session = session
        self.step_s: list[float] = []
        self.rounds = 0
        self.is_over = asyncio.Event()
        self._hidden, self._expected = hidden, expected

    async def run(self) -> None:
        answer = await self.session.step(self._hidden[:, :PROMPT])
        assert_close(answer, self._expected[:, :PROMPT], 1e-4, 1e-4, "prefill")
        while not self.is_over.is_set():
            self.session.position = PROMPT
            for position in range(PROMPT, END):
                began_s = time.perf_counter()
                answer = await self.session.step(self._hidden[:, position : position + 1])
                self.step_s.append(time.perf_counter() - began_s)
                assert_close(answer[:, 0], self._expected[:, position], 1e-4, 1e-4, f"position {position}")
            self.rounds += 1


async def two_daemons(launch: Launch) -> tuple[DaemonProcess, DaemonProcess]:
    """One with a free choice, at 0:2, and one that has all blocks."""
    whole = launch("whole", "blocks.span=0:4", "engine.kv_tokens=512")
    await whole.start()
    await whole.online()
    mover = launch("mover", "blocks.count=2", "blocks.balance_quality=0", "engine.kv_tokens=512")
    await mover.start()
    assert (await mover.online())["span"] == "0:2"
    return mover, whole


def decoders(node: Node, peer: str, model: Any, spans: list[BlockSpan]) -> list[Decoder]:
    made = []
    for seed, span in enumerate(spans):
        hidden = states(1, END, seed)
        terms = StreamTerms(PREFIX, END, ClientOptions(request_timeout_s=60))
        session = InferenceSession(OnlyTo(peer, LEAVING), partial(ServerStub, node), terms, span)
        made.append(Decoder(session, through_layers(model, hidden, span).detach(), hidden))
    return made


async def a_round_more(running: list[Decoder]) -> None:
    goal = [decoder.rounds + 2 for decoder in running]  # one that began after now
    await eventually(
        lambda: all(one.rounds >= rounds for one, rounds in zip(running, goal, strict=True)), 120
    )


def report(what: str, steps_s: list[float]) -> None:
    median_s, worst_s = statistics.median(steps_s), max(steps_s)
    figures = f"median {median_s * 1e3:.1f} ms, worst {worst_s / median_s:.1f} times that"
    sys.stdout.write(f"{what}: {len(steps_s)} steps, {figures}\n")


async def test_no_session_is_lost_by_a_move_or_a_stop(launch: Launch, node: Node, model_dir: Path) -> None:
    """Four stay through ``rebalance --to``, four go on at the other daemon; a stop sends the rest there."""
    mover, whole = await two_daemons(launch)
    ctl = Ctl(Path((await mover.event("control_socket_open"))["path"]))
    peer, other = (await mover.online())["peer_id"], (await whole.online())["peer_id"]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    staying = decoders(node, peer, model, [STAYING] * 4)
    leaving = decoders(node, peer, model, [LEAVING, LEAVING, LEAVING, BlockSpan(0, 1)])
    running = [asyncio.create_task(decoder.run()) for decoder in (*staying, *leaving)]
    await a_round_more([*staying, *leaving])
    await a_round_more([*staying, *leaving])
    before = [len(decoder.step_s) for decoder in staying]
    report("before the move", [s for one in staying for s in one.step_s])
    assert (await ctl("rebalance", "--to", "1:3", "--wait")).endswith("done: blocks 1:3 are served\n")
    report("during the move", [s for one, n in zip(staying, before, strict=True) for s in one.step_s[n:]])
    await a_round_more([*staying, *leaving])
    assert {decoder.session.route[0].peer for decoder in staying} == {peer}
    assert {decoder.session.route[0].peer for decoder in leaving} == {other}
    assert (await mover.event("handed_over"))["sessions"] == 4
    mover.send(signal.SIGTERM)
    assert await mover.ended() == 0
    await a_round_more([*staying, *leaving])
    assert {decoder.session.route[0].peer for decoder in staying} == {other}
    assert not [event for event in mover.events if event.get("event") == "drain_abandoned"]
    for decoder in (*staying, *leaving):
        decoder.is_over.set()
    await asyncio.gather(*running)
    await asyncio.gather(*(decoder.session.close() for decoder in (*staying, *leaving)))
