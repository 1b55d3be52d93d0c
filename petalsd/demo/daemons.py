"""A petalsd process with its JSON log read as it comes, and never left behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from petalsd.errors import DeadlineExceeded, PetalsdError

_PR_SET_PDEATHSIG = 1
_KILL_TIMEOUT_S = 5.0


class DaemonExited(PetalsdError):
    """A daemon ended before it was asked to."""

    code = "daemon_exited"


class DaemonProcess:
    """One ``petalsd run``, in a session of its own: Ctrl-C on the terminal reaches only us, and we stop it in
    order. If we are killed, the kernel sends it SIGTERM.

    config  its configuration file, which must set daemon.log_format to json
    state   the directory that it keeps its identity and measurements in; its log goes there too
    """

    def __init__(self, name: str, config: Path, state: Path) -> None:
        self.name = name
        self._config = config
        self._state = state
        self._process: subprocess.Popen[str] | None = None
        self._events: list[dict[str, Any]] = []
        self._tail: deque[str] = deque(maxlen=20)
        self._changed = threading.Condition()
        self._has_ended = False

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "petalsd.cli.main", "run", "--config", str(self._config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"STATE_DIRECTORY": str(self._state)},
            text=True,
            start_new_session=True,
            preexec_fn=partial(_die_with_parent, os.getpid()),
        )
        threading.Thread(target=self._read_log, name=f"log-{self.name}", daemon=True).start()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def peer_id(self) -> str:
        """Known once it has joined."""
        return str(self.wait_for("joined", 0.0)["peer_id"])

    def wait_for(self, event: str, timeout_s: float) -> dict[str, Any]:
        """The first log entry named ``event``; DaemonExited or DeadlineExceeded with the last lines of the log."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for entry in self._events:
                    if entry.get("event") == event:
                        return entry
                tail = "\n".join(self._tail)
                if self._has_ended:
                    raise DaemonExited(f"{self.name} ended before {event!r}:\n{tail}")
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise DeadlineExceeded(f"{self.name}: no {event!r} in {timeout_s:.0f} s:\n{tail}")
                self._changed.wait(left_s)

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_KILL_TIMEOUT_S)

    def stop(self, timeout_s: float) -> int | None:
        """SIGTERM, and SIGKILL after ``timeout_s``; the exit status, None if it was never started."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(_KILL_TIMEOUT_S)

    def _read_log(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        with self._process.stderr as log, (self._state / "log.jsonl").open("w") as copy:
            for line in log:
                copy.write(line)
                copy.flush()
                with self._changed:
                    self._tail.append(line.rstrip())
                    if (entry := _parse(line)) is not None:
                        self._events.append(entry)
                    self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of the block; for the main thread.

    What a handler raises inside of fork() is swallowed there, and leaves the lock of ``logging`` held. What it
    raises between the start of a process and the note of who stops it leaves the process behind.
    """
    come: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, _: come.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        if come:
            signal.raise_signal(come[0])


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
