"""The life cycle: which moves exist, and what follows from each state."""

from __future__ import annotations

import itertools

import pytest

from petalsd.daemon.lifecycle import TRANSITIONS, IllegalTransition, Lifecycle
from petalsd.types import DaemonState as State


def lifecycle_in(*states: State) -> Lifecycle:
    lifecycle = Lifecycle(clock=itertools.count().__next__)
    for state in states:
        lifecycle.move(state)
    return lifecycle


def test_a_whole_life() -> None:
    """Start, serve, move to other blocks, drain, change one's mind, stop."""
    lifecycle = lifecycle_in(
        State.LOADING, State.ONLINE, State.REBALANCING, State.LOADING, State.ONLINE, State.DRAINING,
        State.DRAINED, State.ONLINE, State.DRAINING, State.STOPPING, State.STOPPED,
    )  # fmt: skip
    assert lifecycle.state is State.STOPPED


@pytest.mark.parametrize("old", list(State))
@pytest.mark.parametrize("new", list(State))
def test_a_move_outside_the_table_is_refused_and_changes_nothing(old: State, new: State) -> None:
    """Every pair of states either moves and tells its listeners, or raises naming both and tells nobody."""
    lifecycle = Lifecycle()
    lifecycle.state = old
    heard: list[tuple[State, State]] = []
    lifecycle.subscribe(lambda before, after: heard.append((before, after)))
    if new in TRANSITIONS[old]:
        lifecycle.move(new, "because")
        assert (lifecycle.state, lifecycle.reason, heard) == (new, "because", [(old, new)])
    else:
        with pytest.raises(IllegalTransition, match=rf"from {old.value} to {new.value}"):
            lifecycle.move(new)
        assert (lifecycle.state, heard) == (old, [])


def test_every_state_can_be_stopped_and_the_last_ones_stay() -> None:
    """A stop is possible from wherever the daemon is; STOPPED and FAILED are final."""
    final = {State.STOPPED, State.FAILED}
    for state, following in TRANSITIONS.items():
        assert bool(following) == (state not in final)
        if state not in final | {State.STOPPING}:
            assert State.STOPPING in following


def test_sessions_are_accepted_online_alone() -> None:
    """In no other state."""
    for state in State:
        lifecycle = Lifecycle()
        lifecycle.state = state
        assert lifecycle.accepts_sessions == (state is State.ONLINE)


def test_the_time_of_the_last_move_is_kept() -> None:
    """since_s is the clock's value at the last move."""
    assert lifecycle_in(State.LOADING, State.ONLINE).since_s == 2
