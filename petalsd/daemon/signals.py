"""SIGTERM, SIGINT, SIGHUP to three flags. Handlers only set flags; the daemon acts on them in its own time."""

from __future__ import annotations

import asyncio
import signal
from types import TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Use as a context manager inside the running loop.

    stop     set by the first SIGTERM or SIGINT: drain, then stop
    now      set by the second one: stop without waiting for sessions
    reload   set by SIGHUP; whoever handles it clears it
    """

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.now = asyncio.Event()
        self.reload = asyncio.Event()

    def __enter__(self) -> Signals:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self.request_stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in (*STOP_SIGNALS, signal.SIGHUP):
            loop.remove_signal_handler(number)

    def request_stop(self) -> None:
        if self.stop.is_set():
            self.now.set()
        self.stop.set()
