"""From what the engine and the swarm tell to the series of the metrics."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from petalsd.daemon.recording import DownloadRecorder, EngineRecorder, SwarmRecorder
from petalsd.daemon.span_loader import LoadProgress
from petalsd.engine.iteration_cost import AttentionShare
from petalsd.engine.live_rates import LiveRates
from petalsd.engine.observer import BatchReport, PassTiming, StepTiming
from petalsd.metrics import Metrics
from petalsd.swarm.faults import CODES
from petalsd.swarm.link import LinkMeter
from petalsd.swarm.protocol import STREAM_METHODS, UNARY_METHODS
from tests.daemon.measured import read
from tests.engine.rig import TinyModel, feed, opened, serving, states


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return read(metrics)[name, tuple(sorted(labels.items()))]


def test_a_batch_of_both_phases() -> None:
    """Each phase gets its own tokens, steps and times; the batch is observed once."""
    metrics = Metrics()
    recorder = EngineRecorder(metrics, LiveRates(AttentionShare()))
    steps = [StepTiming(True, 0.2, 0.9), StepTiming(False, 0.001, 0.004), StepTiming(False, 0.002, 0.004)]
    recorder.batch_done(BatchReport(0.003, rows=4, prefill_tokens=64, decode_tokens=3, steps=steps))
    assert value(metrics, "petalsd_tokens_total", phase="prefill") == 64
    assert value(metrics, "petalsd_tokens_total", phase="decode") == 3
    assert value(metrics, "petalsd_steps_total", phase="prefill") == 1
    assert value(metrics, "petalsd_steps_total", phase="decode") == 2
    assert value(metrics, "petalsd_step_seconds_sum", phase="prefill") == 0.9
    assert value(metrics, "petalsd_step_seconds_bucket", phase="decode", le="0.005") == 2
    assert value(metrics, "petalsd_step_queue_seconds_sum", phase="decode") == pytest.approx(0.003)
    assert value(metrics, "petalsd_batch_seconds_count") == 1
    assert value(metrics, "petalsd_batch_rows_sum") == 4
    assert value(metrics, "petalsd_batch_tokens_sum") == 67
    assert value(metrics, "petalsd_prefill_chunk_tokens_sum") == 64


def test_a_chunk_is_what_goes_beside_decode() -> None:
    """Prefill alone takes what it can get, and decode alone has none."""
    metrics = Metrics()
    recorder = EngineRecorder(metrics, LiveRates(AttentionShare()))
    recorder.batch_done(BatchReport(0.003, rows=1, prefill_tokens=64))
    recorder.batch_done(BatchReport(0.003, rows=1, decode_tokens=1))
    assert value(metrics, "petalsd_prefill_chunk_tokens_count") == 0


def test_replayed_and_launched_runs_of_blocks() -> None:
    """Both series are there from the start."""
    metrics = Metrics()
    recorder = EngineRecorder(metrics, LiveRates(AttentionShare()))
    recorder.span_computed(is_replayed=True)
    assert value(metrics, "petalsd_graph_runs_total", outcome="replayed") == 1
    assert value(metrics, "petalsd_graph_runs_total", outcome="launched") == 0


def test_passes_by_direction() -> None:
    metrics = Metrics()
    recorder = EngineRecorder(metrics, LiveRates(AttentionShare()))
    recorder.pass_done(PassTiming(False, 10, 0.1, 0.5))
    recorder.pass_done(PassTiming(True, 7, 0.2, 3.0))
    assert value(metrics, "petalsd_passes_total", direction="forward") == 1
    assert value(metrics, "petalsd_pass_tokens_total", direction="backward") == 7
    assert value(metrics, "petalsd_pass_seconds_sum", direction="backward") == 3.0
    assert value(metrics, "petalsd_pass_queue_seconds_sum", direction="forward") == 0.1


def test_every_method_and_code_has_its_series_from_the_start() -> None:
    """So that the first error is seen as a rise; what happens is counted where it belongs."""
    metrics = Metrics()
    recorder = SwarmRecorder(metrics, LinkMeter())
    for method in (*UNARY_METHODS, *STREAM_METHODS):
        assert value(metrics, "petalsd_rpc_calls_total", method=method) == 0
        for code in CODES:
            assert value(metrics, "petalsd_rpc_errors_total", method=method, code=code) == 0
    recorder.call_began("rpc_push")
    recorder.call_failed("rpc_push", "draining")
    recorder.call_abandoned("rpc_inference")
    assert value(metrics, "petalsd_rpc_calls_total", method="rpc_push") == 1
    assert value(metrics, "petalsd_rpc_errors_total", method="rpc_push", code="draining") == 1
    assert value(metrics, "petalsd_rpc_abandoned_total", method="rpc_inference") == 1


def test_bytes_pushes_and_announcements() -> None:
    metrics = Metrics()
    recorder = SwarmRecorder(metrics, LinkMeter())
    recorder.received(100)
    recorder.received(23)
    recorder.sent(7)
    recorder.pushed(True)
    recorder.announced(False)
    recorder.first_answer(0.2)
    assert value(metrics, "petalsd_wire_received_bytes_total") == 123
    assert value(metrics, "petalsd_wire_sent_bytes_total") == 7
    assert value(metrics, "petalsd_pushes_total", outcome="delivered") == 1
    assert value(metrics, "petalsd_pushes_total", outcome="failed") == 0
    assert value(metrics, "petalsd_dht_announcements_total", outcome="failed") == 1
    assert value(metrics, "petalsd_first_answer_seconds_sum") == 0.2


def test_downloads_count_what_arrives() -> None:
    """Not what was there before, nor blocks, nor anything twice when a file is begun anew."""
    metrics = Metrics()
    recorder = DownloadRecorder(metrics)
    for item, done in (("a", 500), ("a", 600), ("a", 1000), ("b", 10), ("b", 60), ("b", 5), ("b", 25)):
        recorder(LoadProgress("fetch", item, done, 1000))
    recorder(LoadProgress("load", "block 1", 3, 4))
    assert value(metrics, "petalsd_fetched_bytes_total") == 500 + 50 + 20


def test_recording_while_others_read() -> None:
    """The engine thread records while the loop makes the text: nothing is lost, nothing is torn."""
    metrics = Metrics()
    recorder = EngineRecorder(metrics, LiveRates(AttentionShare()))
    report = BatchReport(0.01, rows=2, decode_tokens=2, steps=[StepTiming(False, 0.0, 0.01)] * 2)

    def record() -> None:
        for _ in range(500):
            recorder.batch_done(report)

    threads = [threading.Thread(target=record) for _ in range(2)]
    for thread in threads:
        thread.start()
    seen = [value(metrics, "petalsd_steps_total", phase="decode") for _ in range(5)]
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    assert value(metrics, "petalsd_steps_total", phase="decode") == 2000
    assert value(metrics, "petalsd_step_seconds_count", phase="decode") == 2000


async def test_a_real_engine_fills_them(tmp_path: Path) -> None:
    """A prefill and three decode steps of one session of two rows."""
    metrics = Metrics()
    async with (
        serving(TinyModel(tmp_path), observer=EngineRecorder(metrics, LiveRates(AttentionShare()))) as engine,
        opened(engine, batch=2) as session,
    ):
        await feed(session, states(2, 9), [6, 1, 1, 1])
    assert value(metrics, "petalsd_steps_total", phase="prefill") == 1
    assert value(metrics, "petalsd_steps_total", phase="decode") == 3
    assert value(metrics, "petalsd_tokens_total", phase="prefill") == 12
    assert value(metrics, "petalsd_batch_seconds_count") == 4
    assert value(metrics, "petalsd_session_admission_seconds_count") == 1
