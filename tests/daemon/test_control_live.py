"""A real daemon, asked and steered by the real petalsctl."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from petalsd.status_schemas import schema_of
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import make_chain
from petalsd.types import BlockSpan
from tests.control.double import ask
from tests.daemon.processes import DaemonProcess, Launch
from tests.engine.rig import states
from tests.swarm.stock import StockSession, stock_stub

ANSWER_S = 60

pytestmark = pytest.mark.swarm


class Ctl:
    """``petalsctl --socket PATH``, as a process of its own."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    async def __call__(self, *words: str, status: int = 0) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "petalsd.cli.petalsctl.main", "--socket", str(self.socket), *words,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await asyncio.wait_for(process.communicate(), ANSWER_S)
        assert process.returncode == status, output.decode()
        return output.decode()

    async def json(self, *words: str, status: int = 0) -> Any:
        return json.loads(await self(*words, "--json", status=status))


@pytest.fixture
async def daemon(launch: Launch) -> AsyncIterator[DaemonProcess]:
    daemon = launch(
        "one", "blocks.count=2", "metrics.listen=127.0.0.1:0", "blocks.balance_quality=0.5",
        "engine.kv_spill_bytes=10MB",
    )  # fmt: skip
    await daemon.start()
    await daemon.online()
    yield daemon


@pytest.fixture
def ctl(daemon: DaemonProcess) -> Ctl:
    opened = next(event for event in daemon.events if event["event"] == "control_socket_open")
    return Ctl(Path(opened["path"]))


async def test_every_verb_against_a_real_daemon(daemon: DaemonProcess, ctl: Ctl, node: Node) -> None:
    """One life: ask, plan, move, drain, resume, reload; each document as its schema says."""
    for verb in ("status", "sessions", "peers", "version"):
        jsonschema.validate(await ctl.json(verb), schema_of(verb))
        assert await ctl(verb)
    assert "# TYPE petalsd_" in await ctl("metrics")
    assert (await ctl("wait", "--ready")).strip() == "serving"
    kv = (await ctl.json("status"))["kv"]
    assert kv["spill"]["max_bytes"] == 10_000_000
    assert kv["spill"]["pages_promisable"] > kv["pages_total"]
    assert "0 pages of idle sessions" in await ctl("status")

    plan = await ctl.json("rebalance", "--dry-run", "--to", "2:4")
    jsonschema.validate(plan, schema_of("plan"))
    assert plan["would_move"] and plan["cost"]["blocks_to_load"] == 2
    assert (await ctl("rebalance", "--to", "2:4", "--wait")).endswith("done: blocks 2:4 are served\n")
    moved = await ctl.json("status")
    assert (moved["span"], moved["balance"]["last_move"]["from"]) == (
        {"start": 2, "end": 4},
        {"start": 0, "end": 2},
    )
    assert "the model has the blocks 0:4" in await ctl("rebalance", "--to", "9:11", status=4)

    assert (await ctl("drain", "--wait")).endswith("drained: no sessions are left\n")
    drained = await ctl.json("status", status=1)
    jsonschema.validate(drained, schema_of("status"))
    assert drained["state"] == "drained"
    assert (await ask(ctl.socket, "GET", "/readyz")).status == 503
    assert (await ask(ctl.socket, "GET", "/livez")).status == 200
    assert await ctl("resume") == "serving again\n"
    assert "as it was" in await ctl("reload")
    assert (await ctl.json("status"))["state"] == "online"


async def test_a_prompt_that_comes_again_is_seen_in_status_and_metrics(
    daemon: DaemonProcess, ctl: Ctl, node: Node
) -> None:
    status = await ctl.json("status")
    uid = make_chain(status["model"]["dht_prefix"], BlockSpan(**status["span"]))
    for _ in range(2):
        session = await StockSession(stock_stub(node, status["peer_id"])).open()
        await session.step(uid, states(1, 70), max_length=80)
        assert await session.end()
    kept = (await ctl.json("status"))["kv"]["prefixes"]
    assert (kept["tokens_seen"], kept["tokens_reused"]) == (140, 64)
    assert 0 < kept["bytes"] < kept["max_bytes"]
    assert "64 of 140 tokens reused" in await ctl("status")
    assert 'petalsd_prompt_tokens_total{source="reused"} 64' in await ctl("metrics")


async def test_a_second_daemon_on_the_same_socket_does_not_start(
    daemon: DaemonProcess, ctl: Ctl, launch: Launch
) -> None:
    """It says where and what to do, and the first one is not disturbed."""
    other = launch("two", "blocks.span=0:2", f"control.socket={ctl.socket}")
    await other.start()
    assert await other.ended() == 1
    failed = await other.event("failed")
    assert failed["code"] == "conflict" and str(ctl.socket) in failed["error"]
    assert (await ctl.json("status"))["state"] == "online"
