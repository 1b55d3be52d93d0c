"""What the life cycle means to the service manager: ready, status line, more time, stopping."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from petalsd.systemd import Notifier
from petalsd.types import DaemonState

_PERIOD_S = 1.0
# Granted anew every period, so a start that stands still for this long is ended by systemd.
_EXTENSION_S = 30.0


class Service:
    """Subscribe ``on_move`` to the life cycle and keep ``run`` running; ``line`` makes the status line."""

    def __init__(self, notifier: Notifier, line: Callable[[], str]) -> None:
        self._notifier = notifier
        self._line = line
        self._told = ""
        self._is_starting = True
        self._is_stopping = False

    def on_move(self, old: DaemonState, new: DaemonState) -> None:
        """READY=1 with the first ONLINE: systemd's `start` returns then."""
        self._tell()
        if new is DaemonState.ONLINE and self._is_starting:
            self._is_starting = False
            self._notifier.ready()

    def stopping(self) -> None:
        """A stop was asked for; draining is a part of it."""
        self._is_stopping = True
        self._notifier.stopping()
        self._tell()

    async def notice_stop(self, asked: asyncio.Event) -> None:
        """``stopping`` as soon as ``asked`` is set."""
        await asked.wait()
        self.stopping()

    async def run(self) -> None:
        """Keep the line true, and ask for time while starting or stopping: both may take as long as they move."""
        while True:
            self._tell()
            if self._is_starting or self._is_stopping:
                self._notifier.extend_timeout(_EXTENSION_S)
            await asyncio.sleep(_PERIOD_S)

    def reloading(self) -> None:
        self._notifier.reloading()

    def reloaded(self) -> None:
        """Also after a refused reload: the daemon serves as before."""
        if not self._is_starting:
            self._notifier.ready()

    def _tell(self) -> None:
        line = self._line()
        if line != self._told:
            self._told = line
            self._notifier.status(line)
