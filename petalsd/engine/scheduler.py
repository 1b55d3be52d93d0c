"""Which steps run now: a pure policy over integers; no tensors, no clocks, no sessions.

A *job* is a step that waits: rows, tokens still to compute in each, and a weight (the blocks it runs through). One
call of ``Scheduler.schedule`` plans one iteration of the engine:

1. Decode (one token left per row) goes first, so that a prefill delays the others by one chunk at most.
2. Prefill takes what is left, in chunks: a chunk's worth while somebody decodes or did a few iterations ago (a
   decoding client is away for a round trip between two steps), otherwise the whole budget.
3. A unit of a forward or backward pass follows when no steps wait, else after every few iterations.

Decode never takes the chunk's worth from a waiting prefill, so neither class can starve the other; ``FairQueue``
sees to the peers within a class.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

from petalsd.engine.fair_queue import FairQueue, Job

PASS_PERIOD = 4  # iterations between two units of a waiting pass while steps keep coming
DECODE_MEMORY = 8  # iterations for which a decode keeps prefill to one chunk


class Slice(NamedTuple):
    """Compute ``tokens`` more tokens in each row of the job ``key``; ``is_last`` when that completes it."""

    key: int
    tokens: int
    is_last: bool


class Plan(NamedTuple):
    """One iteration: the slices of one batch, and whether a unit of the waiting pass follows."""

    slices: list[Slice]
    runs_pass: bool


class Scheduler:
    """Plans iterations of at most ``max_batch_tokens`` tokens; see the module docstring for the policy.

    Jobs have at most ``chunk_tokens`` rows and ``chunk_tokens`` is at most half a batch: their turn always fits.
    """

    def __init__(self, max_batch_tokens: int, chunk_tokens: int) -> None:
        if not 0 < chunk_tokens <= max_batch_tokens // 2:
            raise ValueError(f"a chunk of {chunk_tokens} needs a batch of twice that, got {max_batch_tokens}")
        self._max_batch_tokens = max_batch_tokens
        self._chunk_tokens = chunk_tokens
        self._jobs: dict[int, Job] = {}
        self._decode = FairQueue()
        self._prefill = FairQueue()
        self._num_arrivals = 0
        self._since_decode = DECODE_MEMORY
        self._since_pass = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, key: int, peer: str, rows: int, tokens: int, weight: int = 1) -> None:
        """Queue a job; ValueError when the key is taken or the rows can never fit."""
        if key in self._jobs:
            raise ValueError(f"job {key} is already queued")
        if not 0 < rows <= self._chunk_tokens or tokens < 1 or weight < 1:
            raise ValueError(f"job {key}: cannot schedule {rows} rows of {tokens} tokens, weight {weight}")
        self._num_arrivals += 1
        job = self._jobs[key] = Job(key, peer, rows, tokens, weight, self._num_arrivals)
        self._queue_of(job).push(job)

    def remove(self, key: int) -> None:
        """Forget a job; unknown keys are ignored."""
        job = self._jobs.pop(key, None)
        if job is not None:
            self._queue_of(job).discard(job)

    def schedule(self, has_pass: bool = False) -> Plan:
        """Plan one iteration and account for it: planned tokens count as computed, finished jobs are gone."""
        slices: list[Slice] = []
        if self._jobs:
            has_prefill = bool(self._prefill)
            reserved = self._chunk_tokens if has_prefill else 0
            used = self._plan_decode(self._max_batch_tokens - reserved, slices)
            self._since_decode = 0 if used else self._since_decode + 1
            if has_prefill:
                is_quiet = self._since_decode >= DECODE_MEMORY
                self._plan_prefill(self._max_batch_tokens if is_quiet else self._chunk_tokens, slices)
        return Plan(slices, self._is_turn_of_pass(has_pass, bool(slices)))

    def _queue_of(self, job: Job) -> FairQueue:
        return self._decode if job.tokens == 1 else self._prefill

    def _plan_decode(self, budget: int, slices: list[Slice]) -> int:
        """Return the tokens used."""
        queue, used = self._decode, 0
        if not queue:
            return 0
        for job, _ in queue.take_all() if queue.num_rows <= budget else queue.take(budget):
            del self._jobs[job.key]
            slices.append(Slice(job.key, 1, True))
            used += job.rows
        return used

    def _plan_prefill(self, budget: int, slices: list[Slice]) -> None:
        for job, tokens in self._prefill.take(budget):
            is_last = tokens == job.tokens
            slices.append(Slice(job.key, tokens, is_last))
            if is_last:
                del self._jobs[job.key]
            elif job.tokens - tokens == 1:
                self._prefill.discard(job)
                job.tokens = 1
                self._decode.push(job)
            else:
                job.tokens -= tokens

    def _is_turn_of_pass(self, has_pass: bool, has_slices: bool) -> bool:
        self._since_pass += 1
        if not has_pass or (has_slices and self._since_pass < PASS_PERIOD):
            return False
        self._since_pass = 0
        return True


class PassQueue:
    """Which forward or backward pass is on: one at a time until it ends, then the next peer's oldest."""

    def __init__(self) -> None:
        self._by_peer: OrderedDict[str, deque[int]] = OrderedDict()
        self._peer_of: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._peer_of)

    def add(self, key: int, peer: str) -> None:
        self._peer_of[key] = peer
        self._by_peer.setdefault(peer, deque()).append(key)

    def head(self) -> int | None:
        """The pass to work on; stays the same until it is removed."""
        return next(iter(self._by_peer.values()))[0] if self._by_peer else None

    def remove(self, key: int) -> None:
        """Forget a pass, finished or given up; its peer goes to the back. Unknown keys are ignored."""
        peer = self._peer_of.get(key)
        if peer is None:
            return
        was_head = self.head() == key
        del self._peer_of[key]
        keys = self._by_peer[peer]
        keys.remove(key)
        if not keys:
            del self._by_peer[peer]
        elif was_head:
            self._by_peer.move_to_end(peer)
