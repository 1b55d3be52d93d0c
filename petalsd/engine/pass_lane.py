"""The passes of the engine thread: which is on, and as many units of it as a turn has time for."""

from __future__ import annotations

import math
import time
from functools import partial

import structlog

from petalsd.device_faults import raise_if_lost
from petalsd.engine.block_units import Pace, PassUnit
from petalsd.engine.iteration_cost import AttentionShare, CostModel, Work
from petalsd.engine.observer import EngineObserver, PassTiming
from petalsd.engine.outbox import Outbox
from petalsd.engine.pass_queue import PassQueue
from petalsd.engine.passes import PassJob, PassRunner
from petalsd.engine.step import CANARY_PEER
from petalsd.errors import EngineError

log = structlog.get_logger(__name__)


class PassLane:
    """Commands change it between iterations; ``run`` does the work. Nothing here waits.

    ``runner`` computes the passes that begin from now on.
    """

    def __init__(self, runner: PassRunner, attention: AttentionShare, outbox: Outbox) -> None:
        self.runner = runner
        self._attention = attention
        self._outbox = outbox
        self._queue = PassQueue()
        self._jobs: dict[int, PassJob] = {}
        self._pace = Pace(attention, math.inf)
        self._costs = {is_backward: CostModel() for is_backward in (False, True)}
        self._timings: list[PassTiming] = []

    def __bool__(self) -> bool:
        return bool(self._queue)

    @property
    def max_unit_tokens(self) -> int:
        """The most that a unit computes, unless one row is longer."""
        return self.runner.max_tokens

    def submit(self, job: PassJob) -> None:
        """Queue a checked pass."""
        request = job.request
        batch, tokens, _ = request.hidden.shape
        row_cost = math.ceil(self._attention.work(1, tokens, 0, len(request.span)).tokens)
        self._jobs[job.key] = job
        self._queue.add(job.key, request.peer, batch, row_cost, self.runner.group_rows(request))

    def close(self, job: PassJob) -> None:
        """Drop a pass, done or not. Harmless when repeated."""
        self._queue.remove(job.key)
        self._jobs.pop(job.key, None)
        if job.units is not None:
            job.units.close()

    def fail_all(self, error: Exception) -> None:
        for job in list(self._jobs.values()):
            self._fail(job, error)

    def run(self, seconds: float) -> None:
        """Do units for about so long, one at least; one only if there is no limit."""
        now = time.monotonic()
        end = now + seconds
        last_s = 0.0
        while now + last_s <= end and (key := self._queue.head()) is not None:
            started = now
            self._run_unit(self._jobs[key], seconds)
            now = time.monotonic()
            last_s = now - started
            if math.isinf(seconds):
                return

    def report(self, observer: EngineObserver) -> None:
        """Have it told of the passes that were answered since the last time, behind the answers."""
        while self._timings:
            self._outbox.follow_up(partial(observer.pass_done, self._timings.pop()))

    def _run_unit(self, job: PassJob, seconds: float) -> None:
        """One that takes about so long; the smallest there is takes longer, if it must."""
        cost = self._costs[job.is_backward]
        tokens = max(0.0, seconds - cost.read_s) / cost.token_s
        self._pace.tokens = min(tokens, self.runner.max_tokens)
        started = time.monotonic()
        try:
            if job.units is None:
                job.begun_at = started
                job.units = self.runner.start(job.request, self._pace)
            unit = next(job.units)
        except StopIteration as done:
            self.close(job)
            self._outbox.put(job.answer, done.value)
            self._note(job)
        except Exception as error:
            self._fail(job, error)
        else:
            self._account(cost, job, unit, time.monotonic() - started)

    def _account(self, cost: CostModel, job: PassJob, unit: PassUnit, seconds: float) -> None:
        if unit.work is not None:
            cost.observe(unit.work, seconds)
            job.work = Work(job.work.reads + unit.work.reads, job.work.tokens + unit.work.tokens)
            job.device_s += seconds
        if unit.is_pause:
            self._queue.end_group()

    def _note(self, job: PassJob) -> None:
        request, arrived_at = job.request, job.arrived_at
        if request.peer == CANARY_PEER:
            return
        tokens = request.hidden.shape[0] * request.hidden.shape[1]
        queue_s, total_s = job.begun_at - arrived_at, time.monotonic() - arrived_at
        self._timings.append(PassTiming(job.is_backward, tokens, queue_s, total_s, job.work, job.device_s))

    def _fail(self, job: PassJob, error: Exception) -> None:
        """Its answer is EngineError; DeviceLost when no pass can be computed any more."""
        raise_if_lost(error)
        log.error("pass_failed", peer=job.request.peer, span=str(job.request.span), exc_info=error)
        self.close(job)
        self._outbox.put(job.answer, EngineError(f"computing the pass failed: {type(error).__name__}"))
