"""From what engine, calls, announcements and downloads tell, to the counters and histograms of the metrics.

Every series is made at the start, at 0, so that the first event of a kind is seen as a rise.
"""

from __future__ import annotations

from petalsd.daemon.span_loader import LoadProgress
from petalsd.daemon.supervisor import Cause
from petalsd.engine.live_rates import LiveRates
from petalsd.engine.observer import BatchReport, PassTiming
from petalsd.metrics import Metrics
from petalsd.swarm.escrow import Outcome
from petalsd.swarm.faults import CODES
from petalsd.swarm.link import LinkMeter
from petalsd.swarm.protocol import HAND_OVER_METHOD, STREAM_METHODS, UNARY_METHODS


class EngineRecorder:
    """``engine.observer.EngineObserver``. A few microseconds for each batch and each step of it.

    What it hears of batches and passes goes on to ``live``.
    """

    def __init__(self, metrics: Metrics, live: LiveRates) -> None:
        self._live = live
        self._batch_seconds = metrics.histogram("batch_seconds")
        self._batch_rows = metrics.histogram("batch_rows")
        self._batch_tokens = metrics.histogram("batch_tokens")
        self._chunk_tokens = metrics.histogram("prefill_chunk_tokens")
        self._prefill = _Phase(metrics, "prefill")
        self._decode = _Phase(metrics, "decode")
        self._forward = _Direction(metrics, "forward")
        self._backward = _Direction(metrics, "backward")
        self._admission_seconds = metrics.histogram("session_admission_seconds")
        runs = metrics.counter("graph_runs_total")
        self._graph_runs = {True: runs.labels("replayed"), False: runs.labels("launched")}

    def batch_done(self, report: BatchReport) -> None:
        self._live.batch_done(report)
        self._batch_seconds.observe(report.duration_s)
        self._batch_rows.observe(report.rows)
        self._batch_tokens.observe(report.prefill_tokens + report.decode_tokens)
        if report.prefill_tokens and report.decode_tokens:
            self._chunk_tokens.observe(report.prefill_tokens)
        for is_prefill, queue_s, total_s in report.steps:
            phase = self._prefill if is_prefill else self._decode
            phase.queue_seconds.observe(queue_s)
            phase.seconds.observe(total_s)
        num_prefills = sum(step.is_prefill for step in report.steps)
        self._prefill.add(num_prefills, report.prefill_tokens)
        self._decode.add(len(report.steps) - num_prefills, report.decode_tokens)

    def pass_done(self, timing: PassTiming) -> None:
        self._live.pass_done(timing)
        direction = self._backward if timing.is_backward else self._forward
        direction.passes.inc()
        direction.tokens.inc(timing.tokens)
        direction.queue_seconds.observe(timing.queue_s)
        direction.seconds.observe(timing.total_s)

    def span_computed(self, *, is_replayed: bool) -> None:
        self._graph_runs[is_replayed].inc()

    def session_admitted(self, wait_s: float) -> None:
        self._admission_seconds.observe(wait_s)


class CacheRecorder:
    """``kvcache.observer.PoolObserver``, for one pool after the other."""

    def __init__(self, metrics: Metrics) -> None:
        copies = metrics.counter("kv_copied_pages_total")
        self._shared, self._moved = copies.labels("write"), copies.labels("compaction")
        self._spilled_bytes = metrics.counter("kv_spilled_bytes_total")
        self._restored_bytes = metrics.counter("kv_restored_bytes_total")
        self._spill_seconds = metrics.histogram("kv_spill_seconds")
        self._restore_seconds = metrics.histogram("kv_restore_seconds")
        self._failures = metrics.counter("kv_spill_failures_total")

    def copied(self, num_shared: int, num_moved: int) -> None:
        self._shared.inc(num_shared)
        self._moved.inc(num_moved)

    def spilled(self, num_bytes: int, seconds: float) -> None:
        self._spilled_bytes.inc(num_bytes)
        self._spill_seconds.observe(seconds)

    def restored(self, num_bytes: int, seconds: float) -> None:
        self._restored_bytes.inc(num_bytes)
        self._restore_seconds.observe(seconds)

    def spill_failed(self) -> None:
        self._failures.inc()


class _Phase:
    """The series of prefill or of decode."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._steps = metrics.counter("steps_total").labels(name)
        self._tokens = metrics.counter("tokens_total").labels(name)
        self.seconds = metrics.histogram("step_seconds").labels(name)
        self.queue_seconds = metrics.histogram("step_queue_seconds").labels(name)

    def add(self, steps: int, tokens: int) -> None:
        """Nothing of a phase is the usual case, and costs nothing."""
        if tokens:
            self._tokens.inc(tokens)
        if steps:
            self._steps.inc(steps)


class _Direction:
    """The series of forward or of backward passes."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self.passes = metrics.counter("passes_total").labels(name)
        self.tokens = metrics.counter("pass_tokens_total").labels(name)
        self.seconds = metrics.histogram("pass_seconds").labels(name)
        self.queue_seconds = metrics.histogram("pass_queue_seconds").labels(name)


class SwarmRecorder:
    """``swarm.observer.SwarmObserver``; what it hears of transfers goes on to ``link``."""

    def __init__(self, metrics: Metrics, link: LinkMeter) -> None:
        self._link = link
        streamed = (*STREAM_METHODS, HAND_OVER_METHOD)
        methods = (*UNARY_METHODS, *streamed)
        calls, errors = metrics.counter("rpc_calls_total"), metrics.counter("rpc_errors_total")
        abandoned = metrics.counter("rpc_abandoned_total")
        self._calls = {method: calls.labels(method) for method in methods}
        self._errors = {(method, code): errors.labels(method, code) for method in methods for code in CODES}
        self._abandoned = {method: abandoned.labels(method) for method in streamed}
        self._received = metrics.counter("wire_received_bytes_total")
        self._sent = metrics.counter("wire_sent_bytes_total")
        self._first_answer = metrics.histogram("first_answer_seconds")
        prompts = metrics.counter("prompt_tokens_total")
        self._computed, self._reused = prompts.labels("computed"), prompts.labels("reused")
        pushes, announcements = metrics.counter("pushes_total"), metrics.counter("dht_announcements_total")
        hand_overs = metrics.counter("hand_overs_total")
        self._hand_overs = {outcome: hand_overs.labels(outcome.value) for outcome in Outcome}
        self._pushes = {True: pushes.labels("delivered"), False: pushes.labels("failed")}
        self._announcements = {True: announcements.labels("stored"), False: announcements.labels("failed")}

    def call_began(self, method: str) -> None:
        self._calls[method].inc()

    def call_failed(self, method: str, code: str) -> None:
        self._errors[method, code].inc()

    def call_abandoned(self, method: str) -> None:
        self._abandoned[method].inc()

    def received(self, num_bytes: int) -> None:
        self._received.inc(num_bytes)

    def sent(self, num_bytes: int) -> None:
        self._sent.inc(num_bytes)

    def flowed(self, num_bytes: int, seconds: float, *, is_upload: bool) -> None:
        self._link.flowed(num_bytes, seconds, is_upload=is_upload)

    def acknowledged(self, peer: str, num_bytes: int, seconds: float) -> None:
        self._link.acknowledged(peer, num_bytes, seconds)

    def first_answer(self, wait_s: float) -> None:
        self._first_answer.observe(wait_s)

    def prompt_began(self, tokens: int, num_reused: int) -> None:
        self._computed.inc(tokens - num_reused)
        self._reused.inc(num_reused)

    def pushed(self, is_delivered: bool) -> None:
        self._pushes[is_delivered].inc()

    def handed_over(self, outcome: Outcome) -> None:
        self._hand_overs[outcome].inc()

    def announced(self, is_stored: bool) -> None:
        self._announcements[is_stored].inc()


class DownloadRecorder:
    """A ``ProgressSink``: counts what arrives. What an earlier life had fetched of a file is not counted again."""

    def __init__(self, metrics: Metrics) -> None:
        self._bytes = metrics.counter("fetched_bytes_total")
        self._file = ""
        self._done_bytes = 0

    def __call__(self, progress: LoadProgress) -> None:
        if progress.stage != "fetch":
            return
        if progress.item == self._file and progress.done > self._done_bytes:
            self._bytes.inc(progress.done - self._done_bytes)
        self._file, self._done_bytes = progress.item, progress.done


def declare_causes(metrics: Metrics) -> None:
    """Make the series of ``rebalances_total``."""
    for cause in Cause:
        metrics.counter("rebalances_total").labels(cause.value)
