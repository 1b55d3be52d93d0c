"""The conversation with systemd: readiness, status lines, time extensions and the watchdog (sd_notify(3)).

Outside systemd every call does nothing, so that nobody has to ask where the daemon runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import sdnotify

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_UNWATCHED_INTERVAL_S = 60.0
_MAX_STATUS_CHARS = 200  # a longer line only makes `systemctl status` hard to read


class Notifier:
    """``watchdog_interval_s``: how often systemd wants a ping at the latest; None: not at all."""

    def __init__(
        self, channel: sdnotify.SystemdNotifier | None = None, watchdog_interval_s: float | None = None
    ) -> None:
        self._channel = channel
        self.watchdog_interval_s = watchdog_interval_s
        self.last_ping_monotonic_s: float | None = None

    @property
    def proof_interval_s(self) -> float:
        """How often we prove that we work: as systemd wants it, or all the same where it does not watch."""
        return self.watchdog_interval_s or _UNWATCHED_INTERVAL_S

    @classmethod
    def take(cls) -> Notifier:
        """Speak for this process alone: the variables leave the environment, so that no child inherits them."""
        channel = sdnotify.SystemdNotifier() if os.environ.get("NOTIFY_SOCKET") else None
        interval_s = _watchdog_interval_s(os.environ) if channel else None
        for name in _VARIABLES:
            os.environ.pop(name, None)
        return cls(channel, interval_s)

    def ready(self) -> None:
        """Starting, or reloading, is done."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows."""
        line = " ".join(text.split())
        self._send(f"STATUS={line[:_MAX_STATUS_CHARS]}")

    def reloading(self) -> None:
        """Both assignments in one datagram, which is how systemd knows that they belong together."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def extend_timeout(self, seconds: float) -> None:
        """Starting or stopping goes on and will say so again within ``seconds``."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def watchdog(self) -> None:
        """We are well; only to be called when that was proved."""
        self.last_ping_monotonic_s = time.monotonic()
        if self.watchdog_interval_s is not None:
            self._send("WATCHDOG=1")

    def watchdog_trigger(self) -> None:
        """We are beyond help: restart us now instead of when the interval is over."""
        self._send("WATCHDOG=trigger")

    def close(self) -> None:
        """Say nothing any more."""
        channel, self._channel = self._channel, None
        if channel is not None and channel.socket is not None:
            channel.socket.close()

    def _send(self, state: str) -> None:
        if self._channel is not None:
            # sdnotify writes Latin-1, and says nothing where that cannot be done; systemd reads UTF-8.
            self._channel.notify(state.encode(errors="replace").decode("latin-1"))


def _watchdog_interval_s(environ: Mapping[str, str]) -> float | None:
    """None unless the watchdog is meant for this very process (sd_watchdog_enabled(3))."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6
