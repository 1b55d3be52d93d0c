"""A queue of jobs that shares what the device computes fairly among peers; integers only.

Start-time fair queueing (Goyal, Vin and Chen, 1996); the peer is the flow. What a job costs says its user: tokens
times blocks, and more where attention is long. Each peer has a virtual time that grows by what it was given, the
smallest goes first, and a peer that comes (back) starts at the clock: it has no credit from before. The clock
grows with the fair share of what was given out, and at least to the smallest waiting time, so that a stream of new
peers cannot hold up an old one for ever. Who was given more than its share is in debt, ahead of the clock. That is
remembered of idle peers too, as far as they are few or their debts large: many identities are many shares, but
they wash nothing off.

Within a peer jobs run in order of arrival. A head job that doesn't fit what is left makes its peer wait rather
than be overtaken: the peer falls behind in virtual time and comes first next.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

_MAX_IDLE_PEERS = 1024  # peers without a job whose virtual time is remembered
_KEPT_DEBTS = _MAX_IDLE_PEERS // 2  # once they are more: half, so that the next time is far


@dataclass(slots=True)
class Job:
    """``tokens`` left to compute in each of ``rows`` through ``blocks`` blocks.

    context     tokens that each row holds already
    arrived_at  when it was handed in, in seconds of any one clock
    arrival     orders equals
    """

    key: int
    peer: str
    rows: int
    tokens: int
    blocks: int = 1
    context: int = 0
    arrived_at: float = 0.0
    arrival: int = 0


Cost: TypeAlias = Callable[[Job, int], int]  # of that many tokens in each row of a job, at least 1
Allot: TypeAlias = Callable[[Job], int]  # tokens that each row of a job gets now; 0: it doesn't fit


class FairQueue:
    """Jobs of one class, see the module docstring. Holds at least one job for each peer in ``_by_peer``."""

    def __init__(self, cost: Cost) -> None:
        self.num_rows = 0
        self._cost = cost
        self._by_peer: dict[str, OrderedDict[int, Job]] = {}
        self._virtual_time: dict[str, int] = {}
        self._clock = 0

    def __bool__(self) -> bool:
        return bool(self._by_peer)

    def push(self, job: Job) -> None:
        """Queue a job behind its peer's others."""
        jobs = self._by_peer.get(job.peer)
        if jobs is None:
            jobs = self._by_peer[job.peer] = OrderedDict()
            self._virtual_time[job.peer] = max(self._virtual_time.get(job.peer, 0), self._clock)
        jobs[job.key] = job
        self.num_rows += job.rows

    def discard(self, job: Job) -> None:
        """Drop a job that is in the queue."""
        jobs = self._by_peer[job.peer]
        del jobs[job.key]
        self.num_rows -= job.rows
        if not jobs:
            del self._by_peer[job.peer]

    def take_all(self) -> list[tuple[Job, int]]:
        """Empty the queue: every job with all its tokens. For the usual case that everything fits."""
        taken = [(job, job.tokens) for jobs in self._by_peer.values() for job in jobs.values()]
        num_peers = len(self._by_peer)
        self._by_peer.clear()
        self.num_rows = 0
        self._charge(taken, num_peers)
        return taken

    def take(self, allot: Allot) -> list[tuple[Job, int]]:
        """Ask ``allot`` for one job after the other: pairs of a job and the tokens it gets per row, at least one.

        A job that gets all its tokens leaves the queue; at most one per peer gets fewer, and keeps its place.
        """
        taken: list[tuple[Job, int]] = []
        num_peers = len(self._by_peer)
        order = [(self._virtual_time[peer], job.arrival, peer) for peer, job in self._heads()]
        heapq.heapify(order)
        while order:
            virtual_time, _, peer = heapq.heappop(order)
            job = next(iter(self._by_peer[peer].values()))
            tokens = allot(job)
            if tokens == 0:
                continue
            taken.append((job, tokens))
            if tokens < job.tokens:
                continue
            self.discard(job)
            jobs = self._by_peer.get(peer)
            if jobs:
                following = virtual_time + self._cost(job, tokens)
                heapq.heappush(order, (following, next(iter(jobs.values())).arrival, peer))
        self._charge(taken, num_peers)
        return taken

    def _heads(self) -> Iterator[tuple[str, Job]]:
        for peer, jobs in self._by_peer.items():
            yield peer, next(iter(jobs.values()))

    def _charge(self, taken: list[tuple[Job, int]], num_peers: int) -> None:
        """Add to the virtual times what was given out, and move the clock on."""
        total = 0
        for job, tokens in taken:
            cost = self._cost(job, tokens)
            self._virtual_time[job.peer] += cost
            total += cost
        self._clock += -(-total // max(num_peers, 1))
        if self._by_peer:
            self._clock = max(self._clock, min(self._virtual_time[peer] for peer in self._by_peer))
        if len(self._virtual_time) > len(self._by_peer) + _MAX_IDLE_PEERS:
            self._forget()

    def _forget(self) -> None:
        """Of idle peers only those with the largest debts stay; one without any comes back at the clock anyway."""
        waiting = {peer: self._virtual_time[peer] for peer in self._by_peer}
        debtors = [
            (time, peer)
            for peer, time in self._virtual_time.items()
            if time > self._clock and peer not in waiting
        ]
        self._virtual_time = waiting | {peer: time for time, peer in heapq.nlargest(_KEPT_DEBTS, debtors)}
