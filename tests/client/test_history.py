"""Histories: what is fed again to another server equals what the lost one was fed."""

from __future__ import annotations

import pytest
import torch

from petalsd.client.history import InputHistory, PromptHistory, StepLog
from petalsd.types import BlockSpan


def states(batch: int, tokens: int, first: int = 0) -> torch.Tensor:
    values = torch.arange(first, first + tokens, dtype=torch.float32)
    rows = torch.arange(batch, dtype=torch.float32) * 1000
    return (rows[:, None] + values[None, :])[:, :, None].expand(batch, tokens, 3).clone()


def test_history_returns_what_was_appended_over_many_growths() -> None:
    """Appending pieces of any size gives back one sequence."""
    history, whole = InputHistory(), states(2, 300)
    for start, stop in ((0, 1), (1, 70), (70, 70), (70, 299), (299, 300)):
        history.append(whole[:, start:stop])
    assert history.length == 300
    assert torch.equal(history.between(0, 300), whole)
    assert torch.equal(history.between(64, 130), whole[:, 64:130])
    assert history.between(64, 130).is_contiguous()


def test_history_owns_its_memory() -> None:
    """What the caller does to its tensor later does not change the history."""
    history, hidden = InputHistory(), states(1, 4)
    history.append(hidden)
    hidden.zero_()
    assert torch.equal(history.between(0, 4), states(1, 4))


def test_history_truncates_and_goes_on() -> None:
    """After a rollback new states follow the kept ones."""
    history = InputHistory()
    history.append(states(1, 10))
    history.truncate(4)
    history.append(states(1, 2, first=50))
    expected = torch.cat([states(1, 4), states(1, 2, first=50)], dim=1)
    assert torch.equal(history.between(0, history.length), expected)


def test_history_reorders_rows_with_repetition() -> None:
    """Row j becomes old row hypo_ids[j], as in the servers' caches."""
    history = InputHistory()
    history.append(states(3, 5))
    history.reorder((2, 2, 0))
    assert torch.equal(history.between(0, 5), states(3, 5)[[2, 2, 0]])


def test_history_widens_its_dtype() -> None:
    """A server of a wider dtype replacing another loses nothing."""
    history = InputHistory()
    history.append(states(1, 2).to(torch.bfloat16))
    fine = torch.full((1, 1, 3), 1.0001)
    history.append(fine)
    assert torch.equal(history.between(2, 3), fine)


def test_history_refuses_positions_it_does_not_hold() -> None:
    """Truncated states cannot be read by mistake."""
    history = InputHistory()
    history.append(states(1, 5))
    history.truncate(3)
    with pytest.raises(IndexError, match="2:4"):
        history.between(2, 4)


def test_empty_history_of_an_empty_step_has_a_shape() -> None:
    """A session may begin with a step of no tokens."""
    history = InputHistory()
    history.append(torch.zeros(2, 0, 3))
    assert history.between(0, 0).shape == (2, 0, 3)
    assert history.num_rows == 2


@pytest.mark.parametrize("max_tokens", [1, 3, 100])
def test_replayed_pieces_carry_the_prompts_of_the_steps(max_tokens: int) -> None:
    """Adding each piece's slices gives the same sum as adding whole prompts, wherever the cuts fall."""
    prompts = PromptHistory()
    first, second = torch.randn(4, 1, 5, 3), torch.randn(4, 1, 2, 3)
    prompts.add(0, first)
    prompts.add(7, second)
    expected = torch.zeros(4, 1, 12, 3)
    expected[:, :, 0:5] += first
    expected[:, :, 7:9] += second
    actual = torch.zeros(4, 1, 12, 3)
    for start, stop in StepLog().cut(0, 12, max_tokens, prompts.starts()):
        piece = prompts.between(start, stop, BlockSpan(1, 3))
        if piece is not None:
            assert piece.shape[2] <= stop - start
            actual[1:3, :, start : start + piece.shape[2]] += piece
    assert torch.equal(actual[1:3], expected[1:3])


def test_prompts_are_cut_by_a_rollback_and_follow_the_rows() -> None:
    """Rolling back into a prompt keeps its first part; rows change places unless all share it."""
    prompts = PromptHistory(first_block=10)
    own, shared = torch.randn(2, 3, 4, 3), torch.randn(2, 1, 2, 3)
    prompts.add(0, own)
    prompts.add(6, shared)
    prompts.truncate(3)
    prompts.reorder((1, 1, 0))
    assert prompts.starts() == [0]
    kept = prompts.between(0, 3, BlockSpan(10, 12))
    assert kept is not None and torch.equal(kept, own[:, [1, 1, 0], :3])
    assert prompts.between(3, 9, BlockSpan(10, 12)) is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 5, 10, ()), [(0, 5)]),
        ((0, 5, 2, ()), [(0, 2), (2, 4), (4, 5)]),
        ((3, 3, 2, ()), [(3, 3)]),
        ((0, 10, 4, (0, 3, 9)), [(0, 3), (3, 7), (7, 9), (9, 10)]),
        ((5, 8, 100, (0, 3)), [(5, 8)]),
    ],
)
def test_cuts_respect_limit_and_borders(
    arguments: tuple[int, int, int, tuple[int, ...]], expected: list[tuple[int, int]]
) -> None:
    """No step is longer than the limit or crosses the beginning of a prompt; nothing is still one step."""
    assert list(StepLog().cut(*arguments)) == expected


def make_log(whole_from: int | None, *starts: int) -> StepLog:
    log = StepLog(whole_from)
    for start in starts:
        log.add(start)
    return log


@pytest.mark.parametrize(
    ("whole_from", "expected"),
    [
        (None, [(0, 4), (4, 8), (8, 12), (12, 13)]),
        (20, [(0, 4), (4, 8), (8, 12), (12, 13)]),
        (11, [(0, 4), (4, 8), (8, 11), (11, 12), (12, 13)]),
        (10, [(0, 4), (4, 8), (8, 10), (10, 11), (11, 12), (12, 13)]),
        (9, [(0, 4), (4, 8), (8, 9), (9, 10), (10, 11), (11, 12), (12, 13)]),
        (7, [(0, 9), (9, 10), (10, 11), (11, 12), (12, 13)]),
    ],
)
def test_steps_that_must_stay_whole_do(whole_from: int | None, expected: list[tuple[int, int]]) -> None:
    """From the first step that reaches beyond the limit on, each is sent as it came, however long."""
    log = make_log(whole_from, 0, 9, 10, 11, 12)
    assert list(log.cut(0, 13, 4, ())) == expected


def test_rolled_back_steps_are_forgotten() -> None:
    """What is left of a step that was cut in two stays a step."""
    log = make_log(0, 0, 5, 8)
    log.truncate(7)
    log.add(7)
    assert list(log.cut(0, 9, 100, ())) == [(0, 5), (5, 7), (7, 9)]
    log.truncate(0)
    log.add(0)
    assert list(log.cut(0, 2, 100, ())) == [(0, 2)]
