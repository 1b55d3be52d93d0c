"""Starts petalsd processes, waits for what they log, and makes sure that none is left behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

from petalsd.errors import DeadlineExceeded, PetalsdError

_PR_SET_PDEATHSIG = 1


class DaemonExited(PetalsdError):
    """A daemon ended before it was asked to."""

    code = "daemon_exited"


class DaemonProcess:
    """One `petalsd run` with its JSON log read as it comes. Started in a session of its own, so that Ctrl-C on the
    terminal reaches only us and we stop it in order; if we are killed, the kernel sends it SIGTERM.
    """

    def __init__(self, name: str, settings: dict[str, object], log_file: Path) -> None:
        self.name = name
        self.settings = settings
        self.log_file = log_file
        self.process: subprocess.Popen[str] | None = None
        self._events: list[dict[str, Any]] = []
        self._tail: deque[str] = deque(maxlen=20)
        self._changed = threading.Condition()
        self._ended = False

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "petalsd",
            "run",
            "--instance",
            self.name,
            "--set",
            "daemon.log_format=json",
        ]
        for key, value in self.settings.items():
            command += ["--set", f"{key}={value}"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=partial(_die_with_parent, os.getpid()),
        )
        threading.Thread(target=self._read_log, name=f"log-{self.name}", daemon=True).start()

    def wait_for(self, event: str, timeout_s: float) -> dict[str, Any]:
        """The first log entry named ``event``; DaemonExited or DeadlineExceeded with the last lines of the log."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for entry in self._events:
                    if entry.get("event") == event:
                        return entry
                tail = "\n".join(self._tail)
                if self._ended:
                    raise DaemonExited(f"{self.name} ended before {event!r}:\n{tail}")
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise DeadlineExceeded(f"{self.name}: no {event!r} in {timeout_s:.0f} s:\n{tail}")
                self._changed.wait(left_s)

    def stop(self, timeout_s: float) -> int | None:
        """SIGTERM, then SIGKILL after ``timeout_s``; returns the exit status."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(timeout_s)

    def _read_log(self) -> None:
        assert self.process is not None and self.process.stderr is not None
        with self.log_file.open("w") as file:
            for line in self.process.stderr:
                file.write(line)
                file.flush()
                entry = _parse(line)
                with self._changed:
                    self._tail.append(line.rstrip())
                    if entry is not None:
                        self._events.append(entry)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _die_with_parent(parent_pid: int) -> None:
    """Runs in the child before exec: SIGTERM when the parent is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it went before the line above
        os._exit(1)
