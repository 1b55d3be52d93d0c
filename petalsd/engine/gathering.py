"""When to hold a batch back for a moment, because sessions that belong into it are about to come.

Sessions that were answered together come back one after the other: without a pause the first would run alone while
the rest wait for it, and they would alternate in two groups for ever after, each step waiting for an iteration of
the others. A batch of many costs little more than a batch of one, so a pause of less than an iteration pays off.
Whom to wait for is learnt from how long each session stayed away before; clients that are far away are never
waited for.

Times are seconds of one monotonic clock, passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_PAUSE = 0.5  # of an undisturbed iteration: what those that are here may lose
_LATENESS = 1.5  # a session is due after this many times its usual absence, and given up then
_SMOOTHING = 0.3  # weight of the newest observation


@dataclass(slots=True)
class _Habit:
    """``usual_s`` absence, None until it was seen once; ``left_at`` is None while the session is here."""

    left_at: float | None = None
    usual_s: float | None = None


class Gathering:
    """Tells how long the next batch should wait. Knows sessions by their keys."""

    def __init__(self) -> None:
        self._habits: dict[int, _Habit] = {}
        self._iteration_s = 0.0
        self._ended_at = 0.0
        self._ready_at: float | None = None

    def arrived(self, key: int, at: float) -> None:
        """The session handed in a step, ``at`` which time nobody may have looked."""
        habit = self._habits.setdefault(key, _Habit())
        if habit.left_at is not None:
            habit.usual_s = _smoothed(habit.usual_s, at - habit.left_at)
            habit.left_at = None
        if self._ready_at is None:
            self._ready_at = max(at, self._ended_at)

    def answered(self, key: int, at: float) -> None:
        """The session's step was answered: it is away until it arrives again."""
        self._habits.setdefault(key, _Habit()).left_at = at

    def forget(self, key: int) -> None:
        self._habits.pop(key, None)

    def ran(self, iteration_s: float, now: float, has_more: bool) -> None:
        """A batch ended; ``has_more`` when others wait for the next.

        ``iteration_s`` is what its decode rows take alone: no pause is longer because of a prefill beside them.
        """
        self._iteration_s = iteration_s
        self._ended_at = now
        self._ready_at = now if has_more else None

    def pause_s(self, now: float) -> float:
        """Seconds to wait for whoever is due soon; 0 when nobody is. Ask again whenever somebody arrived."""
        if self._ready_at is None or len(self._habits) < 2:
            return 0.0
        limit = self._ready_at + MAX_PAUSE * self._iteration_s
        until = now
        for habit in self._habits.values():
            if habit.left_at is not None and habit.usual_s is not None:
                due = habit.left_at + _LATENESS * habit.usual_s
                if until < due <= limit:
                    until = due
        return until - now


def _smoothed(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _SMOOTHING * (value - mean)
