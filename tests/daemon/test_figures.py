"""What a scrape reads from a daemon at the moments of its life."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import torch

from petalsd import __version__
from petalsd.config_loading import load_config
from petalsd.daemon.assembly import build_parts
from petalsd.daemon.speed import Rates
from petalsd.daemon.supervisor import Cause
from petalsd.daemon.warnings import KINDS
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest
from petalsd.kvcache.spill import SpillArea
from petalsd.metrics import FAMILIES, PREFIX
from petalsd.paths import InstancePaths
from petalsd.types import DaemonState
from tests.daemon.measured import MeasuredStage, plan_of, read
from tests.daemon.test_daemon import stopped, until_online


@pytest.fixture
def stage(model_dir: Path, tmp_path: Path) -> MeasuredStage:
    (tmp_path / "cache").mkdir()
    return MeasuredStage(model_dir, tmp_path)


async def test_before_anything_is_served(stage: MeasuredStage) -> None:
    """What is not known yet is absent, what is nothing yet is 0."""
    assert stage.value("petalsd_state", state="starting") == 1
    assert stage.value("petalsd_span_blocks") == stage.value("petalsd_loaded_blocks") == 0
    assert stage.value("petalsd_kv_capacity_pages") == stage.value("petalsd_waiting_sessions") == 0
    absent = ("span_start_block", "span_end_block", "announced_tokens_per_second", "watchdog_ping_age_seconds",
              "dht_announcement_age_seconds", "engine_step_age_seconds")  # fmt: skip
    assert [stage.value(PREFIX + name) for name in absent] == [None] * len(absent)
    assert stage.value("petalsd_watchdog_interval_seconds") == 60


async def test_one_state_at_a_time(stage: MeasuredStage) -> None:
    """Each state has its series; that of the present one is 1, through the whole life."""

    def shown() -> list[str]:
        return [state.value for state in DaemonState if stage.value("petalsd_state", state=state.value) == 1]

    seen = []
    stage.daemon.lifecycle.subscribe(lambda old, new: seen.extend(shown()))
    running = await until_online(stage)
    await stopped(stage, running)
    assert seen == ["loading", "online", "draining", "drained", "stopping", "stopped"]
    age_s = stage.value("petalsd_state_age_seconds")
    assert age_s is not None
    assert 0 <= age_s < 10


async def test_while_it_serves(stage: MeasuredStage) -> None:
    """Span, model, announcement, throughput: as the daemon has them."""
    running = await until_online(stage)
    stage.engine.sessions = 3
    assert stage.value("petalsd_span_start_block") == 0
    assert stage.value("petalsd_span_end_block") == 2
    assert stage.value("petalsd_span_blocks") == stage.value("petalsd_loaded_blocks") == 2
    assert stage.value("petalsd_model_blocks") == 4
    assert stage.value("petalsd_announced_tokens_per_second") == 1
    assert stage.value("petalsd_rate_source", of="block", source="configured") == 1
    assert stage.value("petalsd_network_tokens_per_second") is None
    stage.rates = Rates(None, 50.0, 400.0, 200.0, "live", "measured")
    assert stage.value("petalsd_announced_tokens_per_second") == 200
    assert stage.value("petalsd_block_tokens_per_second", kind="inference") == 50
    assert stage.value("petalsd_block_tokens_per_second", kind="forward") == 400
    assert stage.value("petalsd_network_tokens_per_second") == 200
    told = [stage.value("petalsd_rate_source", of="block", source=one) for one in ("configured", "live")]
    assert told == [0, 1]
    assert stage.value("petalsd_rate_source", of="network", source="measured") == 1
    assert stage.value("petalsd_sessions") == stage.value("petalsd_session_rows") == 3
    assert stage.value("petalsd_session_rows_limit") == stage.plan.limits.max_sessions
    assert stage.value("petalsd_dht_in_touch") == stage.value("petalsd_dht_known_peers") == 1
    told = [
        stage.value("petalsd_dht_announced_state", state=state) for state in ("offline", "joining", "online")
    ]
    assert told == [0, 0, 1]
    stage.engine.sessions = 0
    await stopped(stage, running)
    assert stage.value("petalsd_dht_announced_state", state="offline") == 1


async def test_what_runs_is_in_labels(stage: MeasuredStage) -> None:
    labels = {name: dict(labels) for name, labels in read(stage.metrics) if name.endswith("_info")}
    assert labels["petalsd_build_info"]["version"] == __version__
    assert labels["petalsd_build_info"]["torch_version"] == torch.__version__
    assert labels["petalsd_model_info"] == {
        "model": stage.plan.prefix, "family": "llama", "dtype": "float32", "quantization": "none",
        "device": "cpu",
    }  # fmt: skip


async def test_every_warning_has_its_series(stage: MeasuredStage) -> None:
    """0 until it is raised, and again when it is cleared."""
    assert all(
        stage.value("petalsd_warning_active", code=code, severity=kind.severity) == 0
        for code, kind in KINDS.items()
    )
    stage.board.set("disk_full", "1 MiB left")
    stage.board.set("swarm_unreachable")
    assert stage.value("petalsd_warning_active", code="disk_full", severity="critical") == 1
    assert stage.value("petalsd_dht_in_touch") == 0
    stage.board.clear("disk_full", "swarm_unreachable")
    assert stage.value("petalsd_warning_active", code="disk_full", severity="critical") == 0
    assert stage.value("petalsd_dht_in_touch") == 1


async def test_the_proof_of_work(stage: MeasuredStage) -> None:
    """Ages count from the ping and from the end of the last batch; a batch that runs has its own time."""
    assert stage.value("petalsd_engine_busy_seconds") == 0
    now = time.monotonic()
    stage.notifier.watchdog_interval_s = 20.0
    stage.notifier.last_ping_monotonic_s = now - 7
    stage.engine.busy_since_s = now - 3
    stage.engine.last_step_s = now - 5
    for name, least in (("watchdog_ping_age", 7), ("engine_step_age", 5), ("engine_busy", 3)):
        age_s = stage.value(f"petalsd_{name}_seconds")
        assert age_s is not None
        assert least <= age_s < least + 5
    assert stage.value("petalsd_watchdog_interval_seconds") == 20


async def test_the_pages_of_the_cache(stage: MeasuredStage) -> None:
    """Promised pages, those that hold tokens, and who waits: from the pool itself."""
    pool = KVPool(stage.plan.geometry, 41, stage.plan.dtype, stage.plan.device)
    stage.engine.pool = pool
    tokens = stage.plan.geometry.page_tokens
    session = await pool.reserve(KVRequest(0, 2, 1, 3 * tokens), 0)
    session.extend(tokens + 3)
    session.truncate(3)
    names = ("capacity", "promisable", "reserved", "mapped", "mapped_peak", "free", "spilled", "shared")
    assert [stage.value(f"petalsd_kv_{name}_pages") for name in names] == [40, 40, 6, 2, 4, 38, 0, 0]
    assert stage.value("petalsd_kv_page_tokens") == tokens
    assert stage.value("petalsd_kv_tail_tokens") == 2 * (tokens - 3)
    assert stage.value("petalsd_kv_spill_file_bytes") == 0
    assert stage.value("petalsd_kv_spill_host_bytes") == 0
    waiting = asyncio.create_task(pool.reserve(KVRequest(0, 2, 20, tokens), 60))
    await asyncio.sleep(0)
    assert stage.value("petalsd_waiting_sessions") == 1
    assert stage.value("petalsd_waiting_session_age_seconds") > 0
    session.close()
    (await waiting).close()
    assert stage.value("petalsd_kv_reserved_pages") == 0


async def test_pages_on_the_disk(stage: MeasuredStage, tmp_path: Path) -> None:
    """Where the pages of two sessions are that take turns, and what their ways have cost."""
    plan = stage.plan
    area = SpillArea(tmp_path, 100 * plan.geometry.page_bytes, 0)
    pool = KVPool(plan.geometry, 41, plan.dtype, plan.device, spill=area, observer=stage.cache_recorder)
    pool.allocate()
    stage.engine.pool = pool
    assert stage.value("petalsd_kv_promisable_pages") == 100
    tokens = 20 * plan.geometry.page_tokens
    sessions = [await pool.reserve(KVRequest(0, 2, 1, tokens), 0) for _ in range(2)]
    for session in sessions:
        assert pool.make_room([(session, tokens)]).ready == [0]
        session.extend(tokens)
    assert pool.make_room([(sessions[0], tokens)]).ready == [0]
    names = ("reserved", "mapped", "spilled")
    assert [stage.value(f"petalsd_kv_{name}_pages") for name in names] == [80, 40, 40]
    page_bytes = plan.geometry.page_bytes
    assert stage.value("petalsd_kv_spill_file_bytes") == 100 * page_bytes
    assert stage.value("petalsd_kv_spilled_bytes_total") == 80 * page_bytes
    assert stage.value("petalsd_kv_restored_bytes_total") == 40 * page_bytes
    assert stage.value("petalsd_kv_spill_seconds_count") == 2
    assert stage.value("petalsd_kv_restore_seconds_count") == 1
    assert stage.value("petalsd_kv_spill_failures_total") == 0
    pool.close()


async def test_page_copies_by_their_cause(stage: MeasuredStage) -> None:
    """A row that writes into a page it shares, and a run that found no room in one piece."""
    plan = stage.plan
    pool = KVPool(plan.geometry, 9, plan.dtype, plan.device, observer=stage.cache_recorder)
    pool.allocate()
    beams = await pool.reserve(KVRequest(0, 1, 2, 5), 0)
    beams.extend(2)
    beams.reorder([0, 0])
    beams.extend(3)
    pool.apply_copies()
    assert stage.value("petalsd_kv_copied_pages_total", cause="write") == 1
    others = [await pool.reserve(KVRequest(0, 1, 1, 1), 0) for _ in range(6)]
    for other in others:
        other.extend(1)
    for other in others[::2]:
        other.close()
    wide = await pool.reserve(KVRequest(0, 3, 1, 1), 0)
    wide.extend(1)
    pool.apply_copies()
    assert stage.value("petalsd_kv_copied_pages_total", cause="compaction") > 0
    assert stage.value("petalsd_kv_copied_pages_total", cause="write") == 1


async def test_a_directory_that_is_gone_costs_its_own_figure_only(
    stage: MeasuredStage, tmp_path: Path
) -> None:
    assert await stage.disks.look() == []
    free = stage.value("petalsd_disk_free_bytes", directory="cache")
    assert free is not None
    assert free > 0
    (tmp_path / "cache").rmdir()
    await stage.disks.look()
    assert stage.value("petalsd_disk_free_bytes", directory="cache") is None
    assert stage.value("petalsd_disk_free_bytes", directory="state") is not None


async def test_leaving_is_counted_by_its_cause(stage: MeasuredStage) -> None:
    """A broken member and a new configuration; a move only where other blocks are served afterwards."""
    running = await until_online(stage)
    again = stage.until(DaemonState.ONLINE)
    stage.member.broken.set()
    await again
    counts = {
        cause: stage.value("petalsd_rebalances_total", cause=cause.value)
        for cause in (Cause.MEMBER_BROKEN, Cause.RECONFIGURED, Cause.ENGINE_BROKEN)
    }
    assert counts == {Cause.MEMBER_BROKEN: 1, Cause.RECONFIGURED: 0, Cause.ENGINE_BROKEN: 0}
    assert stage.value("petalsd_moves_total") == 0
    again = stage.until(DaemonState.ONLINE)
    stage.overrides.append("blocks.span=2:4")
    stage.settings.reload()
    stage.supervisor.check_now()
    await again
    assert stage.value("petalsd_rebalances_total", cause="reconfigured") == 1
    assert stage.value("petalsd_moves_total") == 1
    assert stage.value("petalsd_load_seconds_count") == 2
    assert stage.value("petalsd_span_start_block") == 2
    await stopped(stage, running)


async def test_drains_and_what_they_leave_behind(stage: MeasuredStage) -> None:
    """One on request whose deadline is over before its two sessions are."""
    running = await until_online(stage)
    stage.engine.sessions = 2
    drained = stage.until(DaemonState.DRAINED)
    await stage.daemon.hold(0.0)
    await drained
    assert stage.value("petalsd_drains_total") == 1
    assert stage.value("petalsd_drain_abandoned_total") == 2
    await stopped(stage, running)
    assert stage.value("petalsd_drains_total") == 1


async def test_every_family_has_a_series_once_all_has_happened(stage: MeasuredStage) -> None:
    """Nothing is declared that nobody fills; what a label can be is there from the start."""
    running = await until_online(stage)
    await stage.let_all_happen()
    names = {name for name, _ in read(stage.metrics)}
    missing = [
        name
        for name, family in FAMILIES.items()
        if PREFIX + name + ("_count" if family.kind == "histogram" else "") not in names
    ]
    assert missing == []
    await stopped(stage, running)


async def test_the_parts_of_a_real_daemon_are_measured(model_dir: Path, tmp_path: Path) -> None:
    """Engine and handlers record into the metrics of the parts, where the causes have their series."""
    config = load_config(None, {}, [f"model.source={model_dir}", "engine.device=cpu"]).config
    parts = build_parts(
        config, plan_of(model_dir, tmp_path), InstancePaths("t", tmp_path, tmp_path), lambda: config
    )
    series = read(parts.metrics)
    for cause in Cause:
        assert series["petalsd_rebalances_total", (("cause", cause.value),)] == 0
    assert series["petalsd_steps_total", (("phase", "decode"),)] == 0
    assert series["petalsd_rpc_calls_total", (("method", "rpc_inference"),)] == 0
    member = parts.member.stats()
    assert (member.is_member, member.known_peers, member.announcement) == (False, 0, None)
