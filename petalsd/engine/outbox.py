"""Answers on their way from the engine thread to the loop: one wake-up per iteration, not one per answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import structlog

log = structlog.get_logger(__name__)

_Answer = tuple["asyncio.Future[Any]", Any]


class Outbox:
    """Collects what futures of ``loop`` shall become; ``flush`` sends it. Used on the engine thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._answers: list[_Answer] = []

    def put(self, future: asyncio.Future[Any], result: object) -> None:
        """Resolve ``future`` with ``result``, raising it there when it is an exception, at the next flush."""
        self._answers.append((future, result))

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Have the loop call it, before it gets what was not flushed yet."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *args)

    def flush(self) -> None:
        if self._answers:
            answers, self._answers = self._answers, []
            try:
                self._loop.call_soon_threadsafe(_resolve, answers)
            except RuntimeError:  # the loop is closed: this thread hung in the device and was left behind
                log.warning("answers_lost", num_answers=len(answers))


def _resolve(answers: list[_Answer]) -> None:
    for future, result in answers:
        if future.done():  # its waiter was cancelled
            continue
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)
