"""Which forward or backward pass is on; integers only.

A pass is worked on for one *group* of its rows, those that are in memory together. Then it is the turn of the peer
that was given the least, as in ``FairQueue``: the same peer's, when nobody else waits.
"""

from __future__ import annotations

from petalsd.engine.fair_queue import FairQueue, Job


class PassQueue:
    """Passes by their keys. Within a peer they run in order of arrival."""

    def __init__(self) -> None:
        self._queue = FairQueue(lambda job, rows: rows * job.blocks)
        self._jobs: dict[int, Job] = {}
        self._group_rows: dict[int, int] = {}
        self._head: int | None = None
        self._num_arrivals = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, key: int, peer: str, rows: int, row_cost: int, group_rows: int) -> None:
        """Queue a pass of ``rows`` rows, of which ``group_rows`` are one group and each costs ``row_cost``."""
        self._num_arrivals += 1
        job = Job(key, peer, 1, rows, blocks=max(1, row_cost), arrival=self._num_arrivals)
        self._jobs[key] = job
        self._group_rows[key] = group_rows
        self._queue.push(job)

    def head(self) -> int | None:
        """The pass to work on; stays the same until its group ends or it is removed."""
        if self._head is None and self._queue:
            for job, rows in self._queue.take(self._begin_group):
                job.tokens -= rows
        return self._head

    def _begin_group(self, job: Job) -> int:
        """The first job that is asked for is it."""
        if self._head is not None:
            return 0
        self._head = job.key
        return min(job.tokens, self._group_rows[job.key])

    def end_group(self) -> None:
        """The head's group is done, and others of its follow: whoever's turn it is comes next."""
        self._head = None

    def remove(self, key: int) -> None:
        """Forget a pass, finished or given up. Unknown keys are ignored."""
        job = self._jobs.pop(key, None)
        if job is None:
            return
        del self._group_rows[key]
        if job.tokens:  # else the queue let go of it with its last group
            self._queue.discard(job)
        if self._head == key:
            self._head = None
