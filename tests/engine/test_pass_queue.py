"""Which pass is on: by groups of rows, fair per peer; integers alone."""

from __future__ import annotations

from collections import Counter

from petalsd.engine.pass_queue import PassQueue


def queue_of(peers: str, rows: int = 1, group_rows: int = 1) -> PassQueue:
    """A pass for each letter, which is its peer; keys count from 0."""
    queue = PassQueue()
    for key, peer in enumerate(peers):
        queue.add(key, peer, rows, row_cost=10, group_rows=group_rows)
    return queue


def test_passes_take_turns_by_peer() -> None:
    """A pass of one group is worked on until it ends; then it is the next peer's turn."""
    queue = queue_of("aaab")
    order = []
    while (key := queue.head()) is not None:
        assert queue.head() == key
        order.append(key)
        queue.remove(key)
    assert order == [0, 3, 1, 2]
    queue.remove(0)


def test_a_large_pass_lets_others_go_between_its_groups() -> None:
    """A pass of 100 rows does not hold up another peer's single row for longer than two groups."""
    queue = PassQueue()
    queue.add(0, "large", 100, row_cost=10, group_rows=4)
    assert queue.head() == 0
    queue.add(1, "small", 1, row_cost=10, group_rows=4)
    assert queue.head() == 0, "a group that was begun is ended"
    queue.end_group()
    assert queue.head() == 0, "equals go by arrival"
    queue.end_group()
    assert queue.head() == 1
    queue.remove(1)
    for _ in range(23):
        assert queue.head() == 0
        queue.end_group()
    assert queue.head() is None, "the last group does not pause: its pass ends"
    queue.remove(0)
    assert len(queue) == 0


def test_peers_share_by_cost_and_not_by_number() -> None:
    """One peer's passes of dear rows and another's of cheap ones get the same work done."""
    queue = PassQueue()
    queue.add(0, "dear", 1000, row_cost=40, group_rows=1)
    queue.add(1, "cheap", 1000, row_cost=10, group_rows=1)
    groups: Counter[int | None] = Counter()
    for _ in range(100):
        groups[queue.head()] += 1
        queue.end_group()
    assert 3 * groups[0] <= groups[1] <= 5 * groups[0]


def test_giving_up_a_waiting_pass_leaves_the_running_one() -> None:
    """Removing a pass that waits changes neither the running one nor its peer's turn."""
    queue = queue_of("aabb", rows=3)
    assert queue.head() == 0
    queue.remove(2)
    queue.remove(1)
    assert (queue.head(), len(queue)) == (0, 2)
    queue.remove(0)
    assert queue.head() == 3
    queue.remove(3)
    assert (queue.head(), len(queue)) == (None, 0)
