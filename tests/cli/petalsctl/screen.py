"""A command on a pseudo-terminal, and what a person would see there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence

_CONTROL = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


class Screen:
    """As much of a terminal as petalsctl uses; anything else it is sent is an error. Lines never wrap here."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows: list[list[str]] = [[]]
        self.row = 0
        self.column = 0
        self.has_cursor = True
        self.styles: set[str] = set()

    def feed(self, text: str) -> None:
        position = 0
        while position < len(text):
            if match := _CONTROL.match(text, position):
                self._obey(match[1], match[2])
                position = match.end()
                continue
            self._put(text[position])
            position += 1

    @property
    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.rows).rstrip("\n")

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
            if self.row == len(self.rows):
                self.rows.append([])
        else:
            assert character.isprintable(), repr(character)
            row = self.rows[self.row]
            row += " " * (self.column - len(row))
            row[self.column : self.column + 1] = [character]
            self.column += 1
            assert self.column <= self.columns, f"too wide: {''.join(row)}"

    def _obey(self, argument: str, command: str) -> None:
        if command == "m":
            self.styles.add(argument)
        elif command == "A":
            self.row -= int(argument)
            assert self.row >= 0, "the cursor left the screen"
        elif command == "K":
            del self.rows[self.row][self.column :]
        elif command == "J":
            del self.rows[self.row][self.column :]
            del self.rows[self.row + 1 :]
        elif (argument, command) in (("?25", "l"), ("?25", "h")):
            self.has_cursor = command == "h"
        else:
            raise AssertionError(f"unknown control sequence {argument}{command}")


class TerminalCommand:
    """petalsctl on a terminal of 80 columns and 24 lines."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str], columns: int = 80) -> None:
        self.raw = ""
        self.columns = columns
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        command = [sys.executable, "-m", "petalsd.cli.petalsctl.main", *words]
        environ = {"TERM": "xterm", "LANG": "C.UTF-8", **environ}
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environ, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self._master = master

    @property
    def screen(self) -> Screen:
        screen = Screen(self.columns)
        screen.feed(self.raw)
        return screen

    def wait_for(self, condition: Callable[[str], bool], timeout_s: float = 20.0) -> None:
        """Until ``condition`` holds for the text on the screen."""
        deadline_s = time.monotonic() + timeout_s
        while not condition(self.screen.text):
            assert time.monotonic() < deadline_s and self._read(1.0), (
                f"never came; the screen:\n{self.screen.text}"
            )

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def finish(self, timeout_s: float = 20.0) -> int:
        """Read to the end; the exit status."""
        deadline_s = time.monotonic() + timeout_s
        while self._read(0.5) or self._process.poll() is None:
            assert time.monotonic() < deadline_s, f"does not end; the screen:\n{self.screen.text}"
        os.close(self._master)
        return self._process.wait(1)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(5)

    def _read(self, timeout_s: float) -> bool:
        """Whether more may come."""
        ready, _, _ = select.select([self._master], [], [], timeout_s)
        if not ready:
            return self._process.poll() is None
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other end is closed
            return False
        self.raw += data.decode()
        return bool(data)


def _take_terminal() -> None:
    """Makes the pseudo-terminal the controlling one, so that Ctrl-C reaches the command, and is not ignored.

    A job in the background of a script ignores it, and so would all that it starts.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
