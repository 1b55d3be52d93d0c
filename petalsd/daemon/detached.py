"""Long blocking work (downloads, loading) in a thread that can be abandoned: it never holds up a stop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from petalsd.errors import PetalsdError

_T = TypeVar("_T")


class Abandoned(PetalsdError):
    """Raised inside the work when nobody waits for its result any more."""

    code = "abandoned"


class AbandonSwitch:
    """Handed to the work, which calls ``check`` wherever it can end early."""

    def __init__(self) -> None:
        self._thrown = threading.Event()

    def throw(self) -> None:
        self._thrown.set()

    def check(self) -> None:
        if self._thrown.is_set():
            raise Abandoned("nobody waits for this any more")


async def run_detached(work: Callable[[AbandonSwitch], _T], name: str) -> _T:
    """``work(switch)`` in a daemon thread called ``name``.

    Cancelling the wait throws the switch and returns at once; the interpreter does not wait for such a thread
    when it ends, as it would for those of the default executor.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()
    switch = AbandonSwitch()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def target() -> None:
        result, failure = None, None
        try:
            result = work(switch)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=target, name=name, daemon=True).start()
    try:
        return await done
    finally:
        switch.throw()
