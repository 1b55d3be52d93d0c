"""Which steps run now: a pure policy over numbers; no tensors, no clocks, no sessions.

A *job* is a step that waits. One call of ``Scheduler.schedule`` plans one iteration of the engine:

1. Decode (one token left per row) goes first, all sessions in one batch.
2. Prefill rides along in chunks: while somebody decodes, or did a moment ago (a decoding client is away for a
   round trip between two steps), as much as ``ChunkPolicy`` permits, otherwise as much as a batch takes.
3. Units of forward and backward passes follow when no steps wait, else after every few iterations. Such an
   iteration takes no prefill along, so that a decode step waits for one or the other.

Decode always leaves a chunk's worth of a batch to a waiting prefill, so neither class can starve the other;
``FairQueue`` sees to the peers within a class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from petalsd.engine.chunk_policy import UNLIMITED, ChunkPolicy
from petalsd.engine.fair_queue import FairQueue, Job
from petalsd.engine.iteration_cost import NO_WORK, AttentionShare, Work

PASS_PERIOD = 4  # iterations between two turns of waiting passes while steps keep coming


class Slice(NamedTuple):
    """Compute ``tokens`` more tokens in each row of the job ``key``; ``is_last`` when that completes it."""

    key: int
    tokens: int
    is_last: bool


class Plan(NamedTuple):
    """One iteration: the slices of one batch, and for how long units of waiting passes follow.

    ``pass_s`` is None: they don't; infinite: nobody is held up, any unit is as good as another.
    """

    slices: list[Slice]
    pass_s: float | None


class Scheduler:
    """Plans iterations of at most ``max_batch_tokens`` tokens; see the module docstring for the policy.

    Jobs have at most ``chunk_tokens`` rows and ``chunk_tokens`` is at most half a batch: their turn always fits.
    ``attention`` says how much more a token costs behind many others; by default nothing.
    """

    def __init__(
        self, max_batch_tokens: int, chunk_tokens: int, attention: AttentionShare | None = None
    ) -> None:
        if not 0 < chunk_tokens <= max_batch_tokens // 2:
            raise ValueError(f"a chunk of {chunk_tokens} needs a batch of twice that, got {max_batch_tokens}")
        self._max_batch_tokens = max_batch_tokens
        self._chunk_tokens = chunk_tokens
        self._attention = attention or AttentionShare()
        self._policy = ChunkPolicy()
        self._jobs: dict[int, Job] = {}
        self._decode = FairQueue(self._cost_of)
        self._prefill = FairQueue(self._cost_of)
        self._num_arrivals = 0
        self._since_pass = 0
        self._planned = NO_WORK
        self._has_prefill = False

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        """Queue a job; ValueError when its key is taken or its rows can never fit."""
        if job.key in self._jobs:
            raise ValueError(f"job {job.key} is already queued")
        if not 0 < job.rows <= self._chunk_tokens or job.tokens < 1 or job.blocks < 1:
            raise ValueError(f"cannot schedule {job}")
        self._num_arrivals += 1
        job.arrival = self._num_arrivals
        self._jobs[job.key] = job
        self._queue_of(job).push(job)

    def remove(self, key: int) -> None:
        """Forget a job; unknown keys are ignored."""
        job = self._jobs.pop(key, None)
        if job is not None:
            self._queue_of(job).discard(job)

    @property
    def undisturbed_s(self) -> float:
        """What the decode rows of the last iteration that had any take alone; 0 before there were any."""
        return self._policy.undisturbed_s

    def schedule(self, now: float, has_pass: bool = False) -> Plan:
        """Plan one iteration and account for it: planned tokens count as computed, finished jobs are gone.

        ``now`` is of the clock of ``Job.arrived_at``.
        """
        is_turn = has_pass and self._is_turn_of_pass()
        decode = self._take_decode()
        work = self._planned = self._work_of(decode)
        if decode:
            self._policy.decodes(work, now)
        prefill = [] if is_turn else self._take_prefill(decode, work, now)
        if prefill:
            self._planned = self._work_of(decode + prefill)
        self._has_prefill = bool(prefill)
        slices = [Slice(job.key, 1, True) for job, _ in decode]
        slices += [self._account(job, tokens, now) for job, tokens in prefill]
        return Plan(slices, self._pass_s(now) if is_turn else None)

    def ran(self, seconds: float) -> Work:
        """The batch that was planned last took so long, nothing else included; what work that was."""
        self._policy.ran(self._planned, self._has_prefill, seconds)
        return self._planned

    def _is_turn_of_pass(self) -> bool:
        self._since_pass += 1
        if self._jobs and self._since_pass < PASS_PERIOD:
            return False
        self._since_pass = 0
        return True

    def _pass_s(self, now: float) -> float:
        return math.inf if self._policy.is_quiet(now) else self._policy.pass_s()

    def _take_decode(self) -> list[tuple[Job, int]]:
        queue = self._decode
        budget = self._max_batch_tokens - (self._chunk_tokens if self._prefill else 0)
        if queue.num_rows <= budget:
            taken = queue.take_all()
        else:
            taken = queue.take(_Allotment(budget, UNLIMITED, self._attention))
        for job, _ in taken:
            del self._jobs[job.key]
        return taken

    def _take_prefill(
        self, decode: Sequence[tuple[Job, int]], work: Work, now: float
    ) -> list[tuple[Job, int]]:
        """``work`` is that of the decode rows."""
        if not self._prefill:
            return []
        room = self._max_batch_tokens - sum(job.rows for job, _ in decode)
        if self._policy.is_quiet(now):
            return self._prefill.take(_Allotment(room, UNLIMITED, self._attention))
        oldest = min((job.arrived_at for job, _ in decode), default=now)
        num_blocks = max(job.blocks for job in self._jobs.values())
        tokens = self._policy.prefill_tokens(work, num_blocks, now - oldest)
        return self._prefill.take(_Allotment(room, tokens, self._attention)) if tokens else []

    def _account(self, job: Job, tokens: int, now: float) -> Slice:
        """Count the tokens of a prefill as computed."""
        job.context += tokens
        if tokens == job.tokens:
            del self._jobs[job.key]
            self._policy.expects(now)
            return Slice(job.key, tokens, True)
        if job.tokens - tokens == 1:
            self._prefill.discard(job)
            job.tokens, job.arrived_at = 1, now  # as a decode step it comes now
            self._decode.push(job)
        else:
            job.tokens -= tokens
        return Slice(job.key, tokens, False)

    def _queue_of(self, job: Job) -> FairQueue:
        return self._decode if job.tokens == 1 else self._prefill

    def _cost_of(self, job: Job, tokens: int) -> int:
        return math.ceil(self._attention.work(job.rows, tokens, job.context, job.blocks).tokens)

    def _work_of(self, taken: Sequence[tuple[Job, int]]) -> Work:
        """The work of a batch; the weights are read once."""
        reads = tokens = 0.0
        for job, num_tokens in taken:
            work = self._attention.work(job.rows, num_tokens, job.context, job.blocks)
            reads += work.reads
            tokens += work.tokens
        return Work(reads + max((job.blocks for job, _ in taken), default=0), tokens)


class _Allotment:
    """Shares out ``max_tokens`` tokens over all rows, and ``work_tokens`` of ``Work.tokens``.

    The first job that is asked for gets a token for each of its rows in any case: a turn is worth something.
    """

    def __init__(self, max_tokens: int, work_tokens: float, attention: AttentionShare) -> None:
        self._left = max_tokens
        self._work_left = work_tokens
        self._attention = attention
        self._is_first = True

    def __call__(self, job: Job) -> int:
        within = self._attention.tokens_within(self._work_left, job.rows, job.context, job.blocks)
        tokens = min(job.tokens, self._left // job.rows, max(within, self._is_first))
        self._is_first = False
        self._left -= tokens * job.rows
        self._work_left -= self._attention.work(job.rows, tokens, job.context, job.blocks).tokens
        return tokens
