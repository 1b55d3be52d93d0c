"""The queue that peers share: what each was given is remembered as long as it matters, in bounded memory."""

from __future__ import annotations

from petalsd.engine import fair_queue
from petalsd.engine.fair_queue import FairQueue, Job


class Run:
    """A queue of jobs that cost their tokens, and the order in which they are computed whole."""

    def __init__(self) -> None:
        self.queue = FairQueue(lambda job, tokens: tokens)
        self._num_jobs = 0

    def push(self, peer: str, tokens: int) -> None:
        self._num_jobs += 1
        self.queue.push(Job(self._num_jobs, peer, 1, tokens, arrival=self._num_jobs))

    def take(self, *peers: str) -> list[str]:
        """Have every job of these peers computed that fits, of all by default; whose they were, in turn."""
        taken = self.queue.take(lambda job: job.tokens if not peers or job.peer in peers else 0)
        return [job.peer for job, _ in taken]

    def take_one(self) -> str:
        """Whose turn it is."""
        taken: list[Job] = []

        def only_first(job: Job) -> int:
            taken.append(job)
            return job.tokens if len(taken) == 1 else 0

        self.queue.take(only_first)
        return taken[0].peer

    @property
    def num_remembered(self) -> int:
        return len(self.queue._virtual_time)


def test_a_debt_is_not_washed_off_by_many_identities() -> None:
    """Who was given more than its share waits, also after thousands of new peers that cost next to nothing."""
    run = Run()
    run.push("patient", 10)
    run.push("greedy", 1000)
    run.take("greedy")
    crowd = [f"identity {number}" for number in range(2 * fair_queue._MAX_IDLE_PEERS)]
    for peer in crowd:
        run.push(peer, 1)
    run.take(*crowd)
    run.push("greedy", 10)
    run.push("newcomer", 10)
    assert [run.take_one() for _ in range(3)] == ["patient", "newcomer", "greedy"]


def test_the_largest_debts_are_kept() -> None:
    """Where more peers have one than are remembered, small ones are forgiven."""
    run = Run()
    waiting = [f"waiting {number}" for number in range(2 * fair_queue._MAX_IDLE_PEERS)]
    served = [f"served {number}" for number in range(2 * fair_queue._MAX_IDLE_PEERS)]
    for peer in waiting:
        run.push(peer, 1)
    for peer in served:
        run.push(peer, 10)
    run.push("greedy", 1000)
    run.take("greedy", *served)
    assert run.num_remembered <= len(waiting) + fair_queue._MAX_IDLE_PEERS
    for peer in ("greedy", "newcomer"):
        run.push(peer, 1)
    assert run.take("greedy", "newcomer") == ["newcomer", "greedy"]
