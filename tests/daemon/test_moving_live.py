"""A real daemon moves, then stops, under eight sessions: none of them is lost, and none is fed again."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petalsd.client.options import ClientOptions
from petalsd.client.session import InferenceSession
from petalsd.client.span_session import StreamTerms
from petalsd.swarm.node import Node
from petalsd.swarm.stub import ServerStub
from petalsd.types import BlockSpan
from tests.daemon.measured import total
from tests.daemon.processes import Launch
from tests.daemon.routes import OnlyTo
from tests.daemon.swarms import Member, member_of
from tests.daemon.test_control_live import Ctl
from tests.engine.rig import states
from tests.numeric import assert_close
from tests.reference_layers import through_layers
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(240)]

PREFIX = "tiny-hf"
STAYING, LEAVING = BlockSpan(1, 2), BlockSpan(0, 2)
PROMPT, END = 8, 24


class Decoder:
    """A session that decodes the same tokens again and again, and checks each round of them."""

    def __init__(self, session: InferenceSession, expected: torch.Tensor, hidden: torch.Tensor) -> None:
        self.session = session
        self.rounds = 0
        self.is_over = asyncio.Event()
        self._hidden, self._expected = hidden, expected

    async def run(self) -> None:
        answer = await self.session.step(self._hidden[:, :PROMPT])
        assert_close(answer, self._expected[:, :PROMPT], 1e-4, 1e-4, "prefill")
        while not self.is_over.is_set():
            self.session.position = PROMPT
            for position in range(PROMPT, END):
                answer = await self.session.step(self._hidden[:, position : position + 1])
                assert_close(answer[:, 0], self._expected[:, position], 1e-4, 1e-4, f"position {position}")
            self.rounds += 1


async def two_daemons(launch: Launch) -> tuple[Member, Member]:
    """One with a free choice, at 0:2, and one that has all blocks."""
    whole = launch("whole", "blocks.span=0:4", "engine.kv_tokens=512")
    await whole.start()
    await whole.online()
    mover = launch("mover", "blocks.count=2", "blocks.balance_quality=0", "engine.kv_tokens=512")
    await mover.start()
    assert (await mover.online())["span"] == "0:2"
    return await member_of(mover), await member_of(whole)


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


async def calls(member: Member) -> dict[str, float]:
    """What its metrics say of sessions: opened, taken from others, left to others, ended by another error, fed."""
    series = await member.metrics()
    left = total(series, "rpc_errors_total", method="rpc_inference", code="session_moved")
    return {
        "opened": total(series, "rpc_calls_total", method="rpc_inference"),
        "taken": total(series, "rpc_calls_total", method="rpc_take"),
        "left": left,
        "failed": total(series, "rpc_errors_total") - left,
        "fed": total(series, "tokens_total", phase="prefill"),
    }


async def test_no_session_is_lost_by_a_move_or_a_stop(launch: Launch, node: Node, model_dir: Path) -> None:
    """Four stay through ``rebalance --to``, four go on at the other daemon; a stop sends the rest there.

    None is opened again, none is fed its history again: the other daemon sees no prompt at all.
    """
    mover, whole = await two_daemons(launch)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    staying = decoders(node, mover.peer, model, [STAYING] * 4)
    leaving = decoders(node, mover.peer, model, [LEAVING, LEAVING, LEAVING, BlockSpan(0, 1)])
    running = [asyncio.create_task(decoder.run()) for decoder in (*staying, *leaving)]
    await a_round_more([*staying, *leaving])
    assert await calls(mover) == {"opened": 8, "taken": 0, "left": 0, "failed": 0, "fed": 8 * PROMPT}
    ctl = Ctl(mover.socket)
    assert (await ctl("rebalance", "--to", "1:3", "--wait")).endswith("done: blocks 1:3 are served\n")
    await a_round_more([*staying, *leaving])
    assert {decoder.session.route[0].peer for decoder in staying} == {mover.peer}
    assert {decoder.session.route[0].peer for decoder in leaving} == {whole.peer}
    await mover.daemon.event("moved")
    assert len(mover.events("session_handed_over")) == 4
    assert await calls(mover) == {"opened": 8, "taken": 0, "left": 4, "failed": 0, "fed": 8 * PROMPT}
    assert await calls(whole) == {"opened": 4, "taken": 4, "left": 0, "failed": 0, "fed": 0}
    mover.daemon.send(signal.SIGTERM)
    assert await mover.daemon.ended() == 0
    await a_round_more([*staying, *leaving])
    assert {decoder.session.route[0].peer for decoder in staying} == {whole.peer}
    assert not mover.events("drain_abandoned")
    assert await calls(whole) == {"opened": 8, "taken": 8, "left": 0, "failed": 0, "fed": 0}
    for decoder in (*staying, *leaving):
        decoder.is_over.set()
    await asyncio.gather(*running)
    await asyncio.gather(*(decoder.session.close() for decoder in (*staying, *leaving)))
