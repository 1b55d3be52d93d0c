"""A child process in a process group of its own, with its output in a file: started, awaited, ended for good."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.forked import ForkedProcess

STOP_DEADLINE_S = 20.0
_POLL_S = 0.05
_SHOWN_LINES = 40


class ChildFailed(AssertionError):
    """A child ended or stayed silent when it should not have; the text ends with its last lines."""


class Child:
    """One process and its descendants. Use as a context manager: leaving it leaves no process behind."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        has_input: bool = False,
    ) -> None:
        self.command = list(command)
        self.log = log
        self._stdin = subprocess.PIPE if has_input else subprocess.DEVNULL
        self.environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | ForkedProcess | None = None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = self._spawn(log.fileno())

    def _spawn(self, log: int) -> subprocess.Popen[bytes] | ForkedProcess:
        return subprocess.Popen(
            self.command,
            stdout=log,
            stderr=log,
            stdin=self._stdin,
            env=self.environment,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._running().pid

    def wait_for(self, pattern: str, deadline_s: float) -> re.Match[str]:
        """Block until a line of the output matches; ChildFailed when it ends or the deadline passes first."""
        process, deadline = self._running(), time.monotonic() + deadline_s
        while True:
            ended = process.poll() is not None
            # Only whole lines: what follows the last line break is still being written.
            match = re.search(pattern, self.output().rpartition("\n")[0], re.MULTILINE)
            if match is not None:
                return match
            if ended:
                raise ChildFailed(f"ended with {process.returncode} before {pattern!r}:\n{self.last_lines()}")
            if time.monotonic() > deadline:
                raise ChildFailed(f"no {pattern!r} within {deadline_s} s:\n{self.last_lines()}")
            time.sleep(_POLL_S)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def last_lines(self) -> str:
        return "\n".join([f"$ {' '.join(self.command)}", *self.output().splitlines()[-_SHOWN_LINES:]])

    def send_line(self, line: str) -> None:
        pipe = self._running().stdin
        if pipe is None:
            raise ChildFailed(f"{self.command[0]} was started without an input")
        pipe.write(line.encode() + b"\n")
        pipe.flush()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process itself, as a service manager or a terminal would."""
        self._running().send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGINT, deadline_s: float = STOP_DEADLINE_S) -> int:
        """Ask to stop, wait, then kill what is left of the process group; return the exit code."""
        process = self._running()
        if process.poll() is None:
            process.send_signal(number)
        try:
            return process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            return self.kill()
        finally:
            self._kill_group()

    def kill(self) -> int:
        """End the whole process group at once, as a power cut would."""
        self._kill_group()
        return self._running().wait(timeout=STOP_DEADLINE_S)

    def _kill_group(self) -> None:
        process = self._running()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdin is not None:
            process.stdin.close()

    def _running(self) -> subprocess.Popen[bytes] | ForkedProcess:
        if self._process is None:
            raise ChildFailed(f"{self.command[0]} was not started")
        return self._process

    def __enter__(self) -> Child:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
