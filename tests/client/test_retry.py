"""Retries: which errors are permanent, how long the pauses are, and where it ends."""

from __future__ import annotations

import re

import pytest
from structlog.testing import capture_logs

from petalsd.client.options import ClientOptions
from petalsd.client.retry import RetryBudget, is_refusal
from petalsd.errors import BadRequest, DeadlineExceeded, MissingBlocks, RemoteFailure
from petalsd.swarm.stub import RemoteError

OPTIONS = ClientOptions(min_backoff_s=1.0, max_backoff_s=5.0, recovery_timeout_s=60.0, max_failures=6)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "text",
    [
        str(BadRequest("start_from_position", 7, "at most 3")),
        repr(BadRequest("uid", "x", "a block is named <prefix>.<number>")),
        "Maximum length exceeded: prefix 8 + current 1 exceeds pre-allocated maximum 8",
        "Task size greater than max_batch_size (2048), it can't be processed",
        "Could not allocate 100 bytes, max cache size = 50 bytes",
        "rpc_inference metadata must contain int max_length, got None",
        "not enough values to unpack (expected 3, got 1)",
        "KeyError('adapter foo not found')",
    ],
)
def test_what_every_server_refuses_is_a_refusal(text: str) -> None:
    """petalsd's bad_request and the texts of stock servers, wherever in the error they stand."""
    assert is_refusal(RemoteError("peer", text))
    assert is_refusal(RemoteFailure("peer", f"Failed to call handler `x` at peer: {text}"))


@pytest.mark.parametrize(
    "error",
    [
        RemoteError("peer", "out_of_pages: 3 pages free"),
        RemoteError("peer", "draining: moving"),
        RemoteError("peer", "engine_error: device lost"),
        RemoteError("peer", "Could not allocate 100 bytes immediately: out of memory"),
        RemoteFailure("peer", "closed the stream"),
        DeadlineExceeded("storing took longer"),
        MissingBlocks([1], "tiny"),
    ],
)
def test_what_another_server_or_time_may_mend_is_not(error: Exception) -> None:
    """These are worth another attempt."""
    assert not is_refusal(error)


def test_pauses_double_after_the_first_failure() -> None:
    """The first replacement is tried at once; then 1, 2, 4 … seconds, never more than the limit."""
    budget = RetryBudget(OPTIONS, Clock())
    error = RemoteFailure("peer", "gone")
    assert [budget.next_delay(error) for _ in range(5)] == [0.0, 1.0, 2.0, 4.0, 5.0]


def test_failures_are_counted() -> None:
    """One failure more than allowed is raised as it is."""
    budget = RetryBudget(OPTIONS, Clock())
    for _ in range(OPTIONS.max_failures):
        budget.next_delay(RemoteFailure("peer", "gone"))
    last = RemoteFailure("last", "gone")
    with pytest.raises(RemoteFailure) as caught:
        budget.next_delay(last)
    assert caught.value is last


def test_missing_blocks_are_waited_for_until_the_deadline_only() -> None:
    """They do not use up the failures, but the time counts from the first of them."""
    clock = Clock()
    budget = RetryBudget(OPTIONS, clock)
    delays = 0
    with pytest.raises(MissingBlocks):
        while True:
            clock.now += budget.next_delay(MissingBlocks([3], "tiny"))
            delays += 1
    assert delays > OPTIONS.max_failures
    assert 50 < clock.now <= 60


def test_thousands_of_short_pauses_are_no_trouble() -> None:
    """The doubling ends before floats do."""
    options = ClientOptions(min_backoff_s=1e-6, max_backoff_s=1e-6, recovery_timeout_s=10.0)
    budget = RetryBudget(options, Clock())
    for _ in range(2000):
        assert budget.next_delay(MissingBlocks([3], "tiny")) == 1e-6


def test_what_one_refuses_another_is_asked_once() -> None:
    """The second refusal is raised, whatever came between."""
    budget = RetryBudget(OPTIONS, Clock())
    assert budget.next_delay(RemoteError("a", "bad_request: hidden = 1: no")) == 0.0
    budget.next_delay(RemoteFailure("b", "gone"))
    with pytest.raises(RemoteFailure, match="not so"):
        budget.next_delay(RemoteError("c", "bad_request: hidden = 1: not so"))


def test_a_refusal_stands_when_there_is_nobody_else() -> None:
    """Nothing is waited for: the call fails with what the only server said."""
    budget = RetryBudget(OPTIONS, Clock())
    budget.next_delay(RemoteError("a", "bad_request: hidden = 1: no"))
    with pytest.raises(RemoteFailure, match="bad_request"):
        budget.next_delay(MissingBlocks([1], "tiny"))


@pytest.mark.parametrize(
    "text",
    [
        "out_of_pages: the session (1 row(s) of 9 tokens) needs more than all 4 pages in memory (ask for less)",
        str(BadRequest("max_length", 4096, "must be 0 to 2048")),
        "Cannot allocate KV cache for 4096 tokens, max = 2048",
    ],
)
def test_servers_that_are_too_small_are_asked_once(text: str) -> None:
    """Routes come back to one when no other is left. What failed for another reason may serve the call later."""
    first, second = RemoteError("a", text), RemoteError("b", text)
    budget = RetryBudget(OPTIONS, Clock())
    budget.next_delay(first)
    budget.next_delay(second)
    with pytest.raises(RemoteError, match=re.escape(text)):
        budget.next_delay(first)
    budget = RetryBudget(OPTIONS, Clock())
    for error in (first, RemoteError("b", "out_of_pages: 3 pages free"), first, first):
        budget.next_delay(error)


def test_missing_blocks_are_told_once() -> None:
    """Somebody waits minutes for them, perhaps because of a name that is wrong: the log says how long it may take,
    of which a failure before has used some.
    """
    clock = Clock()
    budget = RetryBudget(OPTIONS, clock)
    budget.next_delay(RemoteError("peer", "gone"))
    clock.now += 20.0
    with capture_logs() as logs:
        for _ in range(3):
            budget.next_delay(MissingBlocks([1, 2], "tiny", "poet"))
    assert logs == [
        {
            "event": "blocks_missing",
            "error": "no server holds blocks 1:3 of tiny with adapter poet",
            "hint": "wait for a server that serves them, or start one; servers may call the model otherwise",
            "gives_up_in_s": OPTIONS.recovery_timeout_s - 20.0,
            "log_level": "warning",
        }
    ]
