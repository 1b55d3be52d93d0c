"""What an administrator asks for and is told, on a daemon made of fakes."""

from __future__ import annotations

import asyncio
import json
import math
from types import SimpleNamespace
from typing import cast

import jsonschema
import pytest
import torch

from petalsd.daemon.administration import Administration
from petalsd.daemon.plan import ServingPlan
from petalsd.daemon.reporting import Reporter
from petalsd.daemon.span_loader import LoadProgress
from petalsd.engine.handle import SessionInfo
from petalsd.engine.step import SessionSpec
from petalsd.errors import BadRequest, Conflict, NotServed, SwarmError
from petalsd.models.ladder import Choice, Rung, Trial
from petalsd.models.weight_storage import WeightStorage
from petalsd.status_schemas import DOCUMENTS, schema_of
from petalsd.swarm.protocol import ServerState
from petalsd.systemd import Notifier
from petalsd.types import BlockSpan, DaemonState
from tests.daemon.fakes import NUM_BLOCKS, OTHER, PEER, Stage
from tests.daemon.test_daemon import DEADLINE_S, stopped, until_online

PLAN = cast(
    ServingPlan,
    SimpleNamespace(
        model=SimpleNamespace(num_blocks=NUM_BLOCKS, model_type="llama"),
        source=SimpleNamespace(source="example/model"),
        prefix="model-hf",
        adapter_names=("poet",),
        dtype_name="float32",
        storage=WeightStorage.choose(torch.float32, torch.device("cpu"), "int8"),
        device=torch.device("cpu"),
    ),
)


def administer(stage: Stage) -> Administration:
    parts = stage.daemon._parts
    reporter = Reporter(stage.daemon, parts, PLAN, "demo", Notifier())
    return Administration(stage.daemon, parts, NUM_BLOCKS, reporter, stage.reloader)


def check(document: object, name: str) -> None:
    """The document as it goes out fits its published schema."""
    model = cast(type, DOCUMENTS[name])
    assert isinstance(document, model)
    jsonschema.validate(json.loads(document.model_dump_json(by_alias=True)), schema_of(name))  # type: ignore[attr-defined]


async def test_a_status_says_how_blocks_are_computed() -> None:
    """The slowest way in use stands for all; what was not finite is null; nothing is known before loading."""
    stage = Stage()
    model = administer(stage).status().model
    assert (model.path, model.kernels, model.block_kinds) == (None, None, [])
    wrong, right = Trial(Rung.FUSED, "avx2", math.inf, 1e-4, 0.1), Trial(Rung.PLAIN, "torch", 1e-6, 1e-4, 0.1)
    fused = Trial(Rung.FUSED, "avx2", 1e-6, 1e-4, 0.1)
    stage.choices = [Choice("full_attention", (wrong, right)), Choice("sliding_attention", (fused,))]
    status = administer(stage).status()
    check(status, "status")
    assert (status.model.path, status.model.kernels) == ("plain", "torch")
    assert [kind.kind for kind in status.model.block_kinds] == ["full_attention", "sliding_attention"]
    trials = status.model.block_kinds[0].trials
    assert [(trial.path, trial.error, trial.is_passed) for trial in trials] == [
        ("fused", None, False), ("plain", 1e-6, True)
    ]  # fmt: skip


async def test_a_status_before_anything_is_known() -> None:
    """Asked for in the first moment: what is not known is null, and the document is complete."""
    status = administer(Stage()).status()
    check(status, "status")
    assert (status.state, status.span, status.kv, status.throughput) == ("starting", None, None, None)
    assert (status.model.dtype, status.model.quantization) == ("float32", "int8")
    assert status.model.adapters == ["poet"]
    assert status.summary == "Starting: starting"


async def test_the_status_of_a_daemon_that_serves() -> None:
    stage = Stage("blocks.span=0:2")
    administration = administer(stage)
    running = await until_online(stage)
    stage.engine.sessions = 3
    status = administration.status()
    check(status, "status")
    assert (status.state, status.instance, status.peer_id) == ("online", "demo", PEER)
    assert status.span is not None and (status.span.start, status.span.end) == (0, 2)
    assert (status.sessions.active, status.sessions.limit) == (3, 256)
    assert status.throughput is not None and status.throughput.tokens_per_s == 1.0
    assert status.balance.is_pinned and status.balance.last_move is None
    assert status.maddrs == [f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}"]
    assert administration.is_ready and administration.problem is None
    stage.engine.sessions = 0
    await stopped(stage, running)
    check(administration.status(), "status")
    assert administration.status().state == "stopped"


async def test_what_is_wrong_is_in_the_status() -> None:
    """The worst first; only what a restart would heal makes the process count as dead."""
    stage = Stage()
    administration = administer(stage)
    stage.board.set("restart_needed", "engine.threads")
    assert administration.problem is None
    stage.board.set("engine_stuck", "at one batch for 90 s")
    status = administration.status()
    check(status, "status")
    assert [one.code for one in status.warnings] == ["engine_stuck", "restart_needed"]
    assert status.warnings[0].severity == "critical"
    assert administration.problem is not None and "90 s" in administration.problem


async def test_a_load_is_shown_with_its_bytes() -> None:
    stage = Stage("blocks.span=0:2")
    administration = administer(stage)
    stage.daemon.lifecycle.move(DaemonState.LOADING)
    stage.daemon._parts.activity.loading(LoadProgress("fetch", "model-00002.safetensors", 500, 2000))
    status = administration.status()
    check(status, "status")
    assert status.loading is not None
    assert (status.loading.stage, status.loading.unit, status.loading.percent) == ("fetching", "bytes", 25)
    assert "model-00002.safetensors" in status.summary


async def test_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    spec = SessionSpec(BlockSpan(1, 3), batch=2, max_tokens=64, peer=OTHER)
    monkeypatch.setattr(stage.engine, "open_sessions", lambda: [SessionInfo(255, spec, 17, 0.0, 0.0, 8)])
    document = administer(stage).sessions()
    check(document, "sessions")
    (entry,) = document.sessions
    assert (entry.id, entry.peer, entry.rows, entry.position, entry.kv_pages) == ("ff", OTHER, 2, 17, 8)


async def test_peers() -> None:
    """Other servers with their pings, and the runs of blocks that nobody serves."""
    stage = Stage("blocks.span=0:2")
    administration = administer(stage)
    running = await until_online(stage)
    stage.swarm.put(OTHER, ServerState.JOINING, BlockSpan(3, 5))
    document = await administration.peers()
    check(document, "peers")
    known = {entry.peer_id: entry for entry in document.peers}
    assert known[PEER].is_self and not known[OTHER].is_self
    assert (known[OTHER].state, known[OTHER].ping_ms) == ("joining", 23.4)
    assert [(span.start, span.end) for span in document.uncovered] == [(2, 8)]
    stage.swarm.put(OTHER, ServerState.ONLINE, BlockSpan(3, 5))
    stage.swarm.ghosts.add(OTHER)
    document = await administration.peers()
    assert [entry.peer_id for entry in document.peers if entry.is_ghost] == [OTHER]
    assert [(span.start, span.end) for span in document.uncovered] == [(2, 8)]
    stage.member.failures["read_view"] = [SwarmError("nobody answers")]
    with pytest.raises(SwarmError):
        await administration.peers()
    await stopped(stage, running)


async def test_a_drain_from_its_begin_to_its_end() -> None:
    stage = Stage("blocks.span=0:2")
    administration = administer(stage)
    running = await until_online(stage)
    stage.engine.sessions = 2
    await administration.drain(600)
    progress = administration.progress("drain")
    check(progress, "progress")
    assert (progress.done, progress.sessions_left, progress.abandoned) == (False, 2, None)
    assert progress.deadline_left_s is not None and 590 < progress.deadline_left_s <= 600
    drained = stage.until(DaemonState.DRAINED)
    stage.engine.sessions = 0
    await asyncio.wait_for(drained, DEADLINE_S)
    progress = administration.progress("drain")
    assert (progress.done, progress.outcome, progress.error) == (True, "no sessions are left", None)
    status = administration.status()
    assert status.drain is not None and status.drain.abandoned == 0
    await administration.resume()
    assert administration.progress("resume").done
    called_off = administration.progress("drain")
    assert called_off.done and called_off.error is not None and "called off" in called_off.error.message
    await stopped(stage, running)


async def test_a_drain_says_whom_its_deadline_ended() -> None:
    stage = Stage("blocks.span=0:2")
    administration = administer(stage)
    running = await until_online(stage)
    stage.engine.sessions = 2
    drained = stage.until(DaemonState.DRAINED)
    await administration.drain(0.05)
    await asyncio.wait_for(drained, DEADLINE_S)
    progress = administration.progress("drain")
    assert (progress.abandoned, progress.outcome) == (2, "2 left at the deadline were ended")
    await stopped(stage, running)


async def test_fewer_blocks_than_fit_may_be_asked_for() -> None:
    """Where their number is free; what the rule would not do is said to be so, with its figures."""
    stage = Stage("blocks.count=auto")
    administration = administer(stage)
    running = await until_online(stage)
    stage.swarm.put(OTHER, ServerState.ONLINE, BlockSpan(4, 8))
    plan = await administration.plan(BlockSpan(1, 3))
    assert plan.would_move and plan.proposed is not None and plan.gain is not None
    assert (plan.gain.swarm_throughput_before, plan.gain.swarm_throughput_after) == (1.0, 0.0)
    assert plan.explanation == "these blocks were asked for; by itself it would not go there"
    with pytest.raises(BadRequest, match="at most 4 blocks"):
        await administration.plan(BlockSpan(0, 5))
    await stopped(stage, running)


async def test_a_plan_to_where_the_swarm_needs_us() -> None:
    """Its figures, and nothing has changed; then the move that it foretold."""
    stage = Stage("blocks.count=4")
    administration = administer(stage)
    running = await until_online(stage)
    stage.swarm.put(OTHER, ServerState.ONLINE, BlockSpan(0, 4))
    stage.engine.open_spans = [BlockSpan(0, 4), BlockSpan(1, 3)]
    stage.calls.clear()
    plan = await administration.plan(None)
    check(plan, "plan")
    assert plan.would_move and plan.proposed is not None and plan.proposed.start == 4
    assert plan.gain is not None and (plan.gain.swarm_throughput_before, plan.gain.ratio) == (0.0, None)
    assert plan.cost is not None and (plan.cost.blocks_to_load, plan.cost.blocks_kept) == (4, 0)
    assert plan.cost.seconds_estimate is not None
    assert (plan.sessions_touched, plan.sessions_kept) == (2, 0)
    assert stage.calls == [] and stage.daemon.lifecycle.state is DaemonState.ONLINE
    online = stage.until(DaemonState.ONLINE)
    stage.engine.open_spans.clear()
    plan = plan.model_copy(update={"sessions_touched": 0})
    assert await administration.rebalance(None) == plan.model_copy(update={"cost": plan.cost})
    assert not administration.progress("rebalance").done
    await asyncio.wait_for(online, DEADLINE_S)
    await asyncio.sleep(0)
    assert administration.progress("rebalance").outcome == "blocks 4:8 are served"
    move = administration.status().balance.last_move
    assert move is not None and (move.from_.start, move.to.start) == (0, 4)
    check(administration.status(), "status")
    await stopped(stage, running)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [(["blocks.count=4"], "no other blocks need this server more"),
     (["blocks.count=4", "blocks.balance_quality=0"], "it never moves by itself"),
     (["blocks.span=0:2"], "the configuration pins the blocks 0:2"),
     (["blocks.span=0:8"], "all blocks of the model are served here")],
)  # fmt: skip
async def test_why_it_stays(overrides: list[str], why: str) -> None:
    stage = Stage(*overrides)
    administration = administer(stage)
    running = await until_online(stage)
    stage.swarm.put(OTHER, ServerState.ONLINE, BlockSpan(4, 8))
    stage.calls.clear()
    plan = await administration.rebalance(None)
    check(plan, "plan")
    assert not plan.would_move and why in plan.explanation
    assert stage.calls == [] and stage.daemon.lifecycle.state is DaemonState.ONLINE
    await stopped(stage, running)


async def test_targets_that_cannot_be_served_are_refused() -> None:
    stage = Stage("blocks.count=4")
    administration = administer(stage)
    with pytest.raises(Conflict, match="the daemon is starting"):
        await administration.rebalance(BlockSpan(0, 4))
    running = await until_online(stage)
    with pytest.raises(BadRequest, match="the model has the blocks 0:8"):
        await administration.rebalance(BlockSpan(6, 10))
    with pytest.raises(BadRequest, match="the configuration asks for 4 blocks"):
        await administration.rebalance(BlockSpan(0, 2))
    assert not (await administration.rebalance(BlockSpan(0, 4))).would_move
    stage.swarm.blocks[0].clear()
    for records in stage.swarm.blocks:
        records.pop(PEER, None)
    with pytest.raises(NotServed, match="our own record"):
        await administration.rebalance(None)
    await stopped(stage, running)
    pinned = Stage("blocks.span=0:2")
    running = await until_online(pinned)
    with pytest.raises(Conflict, match="pins the blocks 0:2"):
        await administer(pinned).rebalance(BlockSpan(2, 4))
    await stopped(pinned, running)


async def test_what_to_type_next_names_the_instance() -> None:
    """Where several run petalsctl refuses a command without; and one that is drained waits for a resume."""
    stage = Stage("blocks.span=0:2")
    administration = administer(stage)
    with pytest.raises(Conflict) as starting:
        await administration.plan(None)
    assert starting.value.hint == "petalsctl -i demo wait --ready"
    with pytest.raises(Conflict) as moving:
        await stage.daemon.move_to(None, "asked")
    assert moving.value.hint == "petalsctl -i demo wait --ready"
    running = await until_online(stage)
    with pytest.raises(Conflict) as pinned:
        await administration.rebalance(BlockSpan(2, 4))
    assert pinned.value.hint.endswith("then: petalsctl -i demo reload")
    failed = administration.progress("drain").error
    assert failed is not None and failed.hint == "petalsctl -i demo status"
    is_drained = stage.until(DaemonState.DRAINED)
    await administration.drain(None)
    await asyncio.wait_for(is_drained, DEADLINE_S)
    with pytest.raises(Conflict) as drained:
        await administration.plan(None)
    assert drained.value.hint == "petalsctl -i demo resume"
    await stopped(stage, running)


async def test_a_reload_tells_what_is_in_force() -> None:
    stage = Stage("blocks.count=4")
    administration = administer(stage)
    running = await until_online(stage)
    stage.overrides += ["daemon.drain_deadline_s=7", "engine.threads=3"]
    outcome = await administration.reload()
    check(outcome, "reloaded")
    assert (outcome.applied, outcome.needs_restart) == (["daemon.drain_deadline_s"], ["engine.threads"])
    await stopped(stage, running)
