"""What the engine thread does with the span it serves: commands change it, ``iterate`` does the work.

Everything here runs on one thread, so nothing is locked; and nothing here waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import structlog
import torch

from petalsd.device_faults import raise_if_lost
from petalsd.engine.batch import BatchItem
from petalsd.engine.captures import Captures
from petalsd.engine.fair_queue import Job
from petalsd.engine.gathering import Gathering
from petalsd.engine.iteration_cost import AttentionShare
from petalsd.engine.kv_transfer import Transfer
from petalsd.engine.limits import EngineLimits
from petalsd.engine.observer import BatchReport, EngineObserver, StepTiming
from petalsd.engine.outbox import Outbox
from petalsd.engine.pass_lane import PassLane
from petalsd.engine.passes import PassRunner
from petalsd.engine.progress import Progress
from petalsd.engine.runner import SpanRunner
from petalsd.engine.scheduler import Plan, Scheduler, Slice
from petalsd.engine.session import EngineSession, StepJob
from petalsd.engine.step import CANARY_PEER
from petalsd.errors import EngineError, PetalsdError, SpillError
from petalsd.kvcache.pool import KVPool
from petalsd.models.contract import Angles, Block
from petalsd.models.model_config import ModelConfig
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_CAPTURE_PAUSE_S = 0.05  # until an idle engine asks again whether it may capture
_TRANSFERS_S = 0.002  # before an iteration, which waits for them; what goes beyond it is one of them at most


@dataclass(frozen=True, slots=True)
class ServedSpan:
    """What is computed on: ``blocks`` by number, one for each block of ``span``, their pages and rotary angles."""

    span: BlockSpan
    blocks: Mapping[int, Block]
    pool: KVPool
    rope: Angles
    config: ModelConfig

    @classmethod
    def of(cls, blocks: Mapping[int, Block], pool: KVPool, rope: Angles) -> ServedSpan:
        """ValueError unless the blocks are consecutive and of the pool's dtype."""
        numbers = sorted(blocks)
        if not numbers or numbers != list(range(numbers[0], numbers[-1] + 1)):
            raise ValueError(f"served blocks must be consecutive, got {numbers}")
        if any(block.dtype != pool.dtype for block in blocks.values()):
            raise ValueError(f"all blocks must have the pool's dtype, {pool.dtype}")
        span = BlockSpan(numbers[0], numbers[-1] + 1)
        return cls(span, blocks, pool, rope, blocks[numbers[0]].config)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def adapters(self) -> tuple[str, ...]:
        """What the blocks were loaded with, all of them the same."""
        return tuple(self.blocks[self.span.start].adapted)


class EngineCore:
    """Sessions, scheduler and runners over one served span."""

    def __init__(
        self,
        served: ServedSpan,
        runner: SpanRunner,
        limits: EngineLimits,
        device: torch.device,
        outbox: Outbox,
        progress: Progress,
        observer: EngineObserver,
    ) -> None:
        self.served = served
        self._pool = served.pool
        self._device = device
        self._outbox = outbox
        self._progress = progress
        self._observer = observer
        self._report = BatchReport()
        attention = AttentionShare.of(served.config)
        self._scheduler = Scheduler(limits.max_batch_tokens, limits.chunk_tokens, attention)
        self._gathering = Gathering()
        # Planned, but the memory held too few pages for them beside the others'.
        self._deferred: list[Slice] = []
        self._sessions: dict[int, EngineSession] = {}
        self._transfers: deque[Transfer] = deque()
        self._runner = runner
        self._inference_mode = torch.inference_mode()
        self._max_pass_tokens = limits.max_pass_tokens
        self.passes = PassLane(self._pass_runner(), attention, outbox)

    @property
    def captures(self) -> Captures | None:
        """Captured steps of the span; None where nothing is captured."""
        return self._runner.captures

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler or self.passes or self._deferred or self._transfers)

    @property
    def has_captures(self) -> bool:
        """Whether steps are still to be captured, or graphs given up, which goes between iterations."""
        return self.captures is not None and not self.captures.are_complete

    def pause_s(self) -> float:
        """Seconds that the next turn should wait: for sessions that are about to come, or to capture."""
        if not self.has_work and self.captures is not None and self.captures.must_wait:
            return _CAPTURE_PAUSE_S
        if self._deferred or self._transfers or not self._scheduler:
            return 0.0
        return self._gathering.pause_s(time.monotonic())

    def _pass_runner(self) -> PassRunner:
        served = self.served
        return PassRunner(served.blocks, served.pool.dtype, self._device, self._max_pass_tokens)

    # Commands, called between iterations

    def change_span(self, served: ServedSpan, runner: SpanRunner) -> None:
        """Compute on other blocks of the model from now on, over the same pool.

        Pages know no blocks, only the first one of their session, so sessions whose blocks are still served go
        on; the others were closed before. A pass under way keeps the blocks that it began with.
        """
        runner.take_over(self._runner)
        self.served, self._runner = served, runner
        self.passes.runner = self._pass_runner()

    def retire(self) -> None:
        """Let go of the blocks and what computes them: sessions that are over may be held by others for long."""
        self.served = replace(self.served, blocks={})
        self.passes.runner = self._pass_runner()
        self._runner.release()

    def submit_step(self, session: EngineSession, job: StepJob) -> None:
        """Take on a step that was checked against the session; its first one makes the session known here."""
        self._sessions[session.key] = session
        session.job = job
        try:
            job.load(self._pool.dtype, self._device)
            session.rewind(job.step)
        except Exception as error:
            self._fail(session, error)
            return
        if job.num_tokens == 0:
            self._complete(session, job, job.hidden.cpu())
            return
        spec = session.spec
        self._gathering.arrived(session.key, job.arrived_at)
        blocks, context, at = len(spec.span), session.position, job.arrived_at
        self._scheduler.add(
            Job(session.key, spec.peer, spec.batch, job.num_tokens, blocks, context, arrived_at=at)
        )

    def submit_transfer(self, transfer: Transfer) -> None:
        """Move a chunk of a session's keys and values; at least one goes before each iteration."""
        self._transfers.append(transfer)

    def close_session(self, session: EngineSession) -> None:
        """Drop the session with whatever it is at, and give its pages back. Harmless when repeated."""
        self._scheduler.remove(session.key)
        self._gathering.forget(session.key)
        self._deferred = [piece for piece in self._deferred if piece.key != session.key]
        self._sessions.pop(session.key, None)
        session.job = None
        session.kv.close()

    def fail_all(self, error: Exception) -> None:
        """End all sessions and passes; steps, passes and transfers under way get EngineError."""
        self._progress.abandon()  # else what failed would look like what hangs
        for session in list(self._sessions.values()):
            self._fail(session, error)
        self.passes.fail_all(error)
        while self._transfers:
            self._fail_transfer(self._transfers.popleft(), error)

    # The iteration

    def iterate(self) -> None:
        """Plan what runs now, run it, answer what is complete. A plan is carried out before the next is made."""
        if self._transfers and not self._deferred:  # those run without anybody who was not planned with them
            self._run_transfers()
            if not (self._scheduler or self.passes):
                return
        deferred, self._deferred = self._deferred, []
        plan = (
            Plan(deferred, None)
            if deferred
            else self._scheduler.schedule(time.monotonic(), has_pass=bool(self.passes))
        )
        start = self._progress.begin(self._num_tokens(plan))
        if plan.slices:
            is_whole = self._run_steps(plan.slices, start)
            now = time.monotonic()
            self._report.duration_s = now - start
            # Canaries are too small to learn from, and the rest of a plan is another batch than was planned.
            if is_whole and not deferred and self._report.rows:
                self._report.work = self._scheduler.ran(now - start)
            has_more = bool(self._scheduler or self._deferred)
            self._gathering.ran(self._scheduler.undisturbed_s, now, has_more)
        if plan.pass_s is not None:
            self.passes.run(plan.pass_s)
        self._progress.end()

    def capture_next(self) -> None:
        """Capture one of the steps that are still to be, if any is: nobody waits for more than that one."""
        if self.captures is not None and self.has_captures:
            self._progress.begin(0)
            self.captures.capture_next()
            self._progress.abandon()

    def _run_transfers(self) -> None:
        """As many as go in little time: one for each iteration would have small ones wait for many of them."""
        until_s = time.monotonic() + _TRANSFERS_S
        while self._transfers:
            self._transfer(self._transfers[0])
            self._transfers.popleft()
            if time.monotonic() >= until_s:
                return

    def _transfer(self, transfer: Transfer) -> None:
        """What it raises ends everything: pages were on their way, or copies between them."""
        self._progress.begin(0)
        try:
            result = transfer.run(self._pool)
        except SpillError as error:  # also a step that waits would compute on what came instead
            self._outbox.put(transfer.answer, error)
            self._fail(transfer.session, error)
        except PetalsdError as error:
            self._outbox.put(transfer.answer, error)
        else:
            self._outbox.put(transfer.answer, result)
        self._progress.end()

    def _fail_transfer(self, transfer: Transfer, error: Exception) -> None:
        log.error("transfer_failed", exc_info=error)
        text = f"moving keys and values failed: {type(error).__name__}"
        self._outbox.put(transfer.answer, EngineError(text))
        raise_if_lost(error)

    def report(self) -> None:
        """Have the observer told about the last iteration, behind its answers."""
        if self._report.rows:
            report, self._report = self._report, BatchReport()
            self._outbox.follow_up(partial(self._observer.batch_done, report))
        self.passes.report(self._observer)

    def _num_tokens(self, plan: Plan) -> int:
        tokens = sum(piece.tokens * self._sessions[piece.key].spec.batch for piece in plan.slices)
        return tokens + (self.passes.max_unit_tokens if plan.pass_s is not None else 0)

    def _run_steps(self, slices: Sequence[Slice], start: float) -> bool:
        """Whether all went as planned."""
        sessions, items = self._prepare(self._make_room(slices), start)
        if not items:
            return False
        self._pool.apply_copies()
        num_failed = len(slices) - len(items)
        for session, item, states in zip(sessions, items, self._compute(items), strict=True):
            if isinstance(states, Exception):
                self._fail(session, states)
                num_failed += 1
                continue
            self._progress.num_tokens += item.rows * item.tokens
            job = session.job
            self._note(session, job, item)
            output = session.accept(states)
            if output is not None and job is not None:
                self._complete(session, job, output)
        return not num_failed

    def _make_room(self, slices: Sequence[Slice]) -> Sequence[Slice]:
        """The slices whose sessions are in memory now, side by side; the others are deferred."""
        if not self._pool.can_spill:
            return slices
        sessions = [self._sessions[piece.key] for piece in slices]
        wanted = [
            (session.kv, session.position + piece.tokens)
            for session, piece in zip(sessions, slices, strict=True)
        ]
        room = self._pool.make_room(wanted)
        if len(room.ready) < len(slices):
            left = set(range(len(slices))).difference(room.ready, room.failed)
            self._deferred = [slices[index] for index in sorted(left)]
            for index, error in room.failed.items():
                self._fail(sessions[index], error)
        return [slices[index] for index in room.ready]

    def _prepare(self, slices: Sequence[Slice], start: float) -> tuple[list[EngineSession], list[BatchItem]]:
        """Make room for the slices' tokens. A session that fails here is out, the others go on."""
        sessions, items = [], []
        for piece in slices:
            session = self._sessions[piece.key]
            try:
                items.append(session.next_item(piece.tokens))
            except Exception as error:
                self._fail(session, error)
                continue
            sessions.append(session)
            if session.job is not None and not session.job.num_done:
                session.job.begun_at = start
        return sessions, items

    def _note(self, session: EngineSession, job: StepJob | None, item: BatchItem) -> None:
        """Count a client's share of the batch."""
        if job is None or session.spec.peer == CANARY_PEER:
            return
        self._report.rows += item.rows
        if job.num_tokens > 1:
            self._report.prefill_tokens += item.rows * item.tokens
        else:
            self._report.decode_tokens += item.rows

    def _compute(self, items: Sequence[BatchItem]) -> list[torch.Tensor | Exception]:
        """Run the items together. When that fails, run each alone, so that only the guilty ones do."""
        try:
            with self._inference_mode:
                return list(self._runner.run(items))
        except Exception as error:
            raise_if_lost(error)
            if len(items) == 1:
                return [error]
            log.warning("batch_failed", num_sessions=len(items), error=repr(error), then="each alone")
        return [result for item in items for result in self._compute([item])]

    def _complete(self, session: EngineSession, job: StepJob, output: torch.Tensor) -> None:
        session.job = None
        now = time.monotonic()
        self._gathering.answered(session.key, now)
        self._progress.num_steps += 1
        if job.num_tokens and session.spec.peer != CANARY_PEER:
            queue_s, total_s = job.begun_at - job.arrived_at, now - job.arrived_at
            self._report.steps.append(StepTiming(job.num_tokens > 1, queue_s, total_s))
        self._outbox.put(job.answer, output)

    def _fail(self, session: EngineSession, error: Exception) -> None:
        """Computing went wrong for this session: its pages are in doubt, so it is over.

        DeviceLost when it went wrong for all of them.
        """
        raise_if_lost(error)
        log.error("session_failed", peer=session.spec.peer, span=str(session.spec.span), exc_info=error)
        job = session.job
        self.close_session(session)
        if job is not None:
            is_told = isinstance(error, EngineError)
            text = f"computing the step failed: {type(error).__name__}"
            self._outbox.put(job.answer, error if is_told else EngineError(text))
