"""Answers on their way from the engine thread to the loop: one wake-up per iteration, not one per answer.

What else the loop shall do about an iteration goes along. While the engine thread did it itself, it kept the
interpreter from the loop, which had been woken and waited to send the answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import structlog

log = structlog.get_logger(__name__)

_Answer = tuple["asyncio.Future[Any]", Any]


class Outbox:
    """Collects what futures of ``loop`` shall become; ``flush`` sends it. Used on the engine thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._answers: list[_Answer] = []
        self._follow_ups: list[Callable[[], object]] = []

    def put(self, future: asyncio.Future[Any], result: object) -> None:
        """Resolve ``future`` with ``result``, raising it there when it is an exception, at the next flush."""
        self._answers.append((future, result))

    def follow_up(self, function: Callable[[], object]) -> None:
        """Have the loop call it once those who wait for the answers of the next flush have had their turn."""
        self._follow_ups.append(function)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Have the loop call it, before it gets what was not flushed yet."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *args)

    def flush(self) -> None:
        if self._answers or self._follow_ups:
            answers, self._answers = self._answers, []
            follow_ups, self._follow_ups = self._follow_ups, []
            try:
                self._loop.call_soon_threadsafe(self._deliver, answers, follow_ups)
            except RuntimeError:  # the loop is closed: this thread hung in the device and was left behind
                if answers:
                    log.warning("answers_lost", num_answers=len(answers))

    def _deliver(self, answers: Sequence[_Answer], follow_ups: Sequence[Callable[[], object]]) -> None:
        """On the loop, where the waiters' tasks come before whatever is called soon after them."""
        for future, result in answers:
            if future.done():  # its waiter was cancelled
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
        for function in follow_ups:
            self._loop.call_soon(function)
