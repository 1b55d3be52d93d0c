"""Standard output whose reader went away, or that leads to a file that takes no more."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class OutputFailed(OSError):
    """Standard output cannot be written; whatever else fails is an OSError of another kind."""

    def __str__(self) -> str:
        return f"the output cannot be written: {self.strerror}"


@contextlib.contextmanager
def watched_output() -> Iterator[None]:
    """Standard output raises OutputFailed, or BrokenPipeError where its reader left.

    It has a buffer: with PYTHONUNBUFFERED nothing under it goes on with what a pipe did not take at once, so a
    long answer would end early, and nobody would hear that its reader left. Characters that its encoding does not
    have become question marks.
    """
    given = sys.stdout
    try:
        raw = io.FileIO(given.fileno(), "w", closefd=False)
    except io.UnsupportedOperation:  # no file, but something in memory
        yield
        return
    errors = "replace" if given.errors in ("strict", "surrogateescape") else given.errors
    sys.stdout = io.TextIOWrapper(
        _Output(raw), given.encoding, errors, line_buffering=bool(given.line_buffering)
    )
    try:
        try:
            yield
        except SystemExit:  # of argparse, after help or a version, whose failures it keeps to itself
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except (OutputFailed, BrokenPipeError):
        give_up_output()
        raise
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stdout = given


def open_closed_streams() -> None:
    """Python has None for a stream that was closed (>&-): what is written there goes nowhere from now on."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def say(*lines: str) -> None:
    """On standard error. One that takes no more changes no exit status."""
    try:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    except OSError:
        give_up_messages()


def give_up_output() -> None:
    """What is still in its buffer goes nowhere; else Python, which writes that at exit, would complain again."""
    _lead_nowhere(sys.stdout)


def give_up_messages() -> None:
    """The same for standard error."""
    _lead_nowhere(sys.stderr)


def _lead_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Output(io.BufferedWriter):
    """Not the file under it: a Ctrl-C between the end of its write and the buffer's own account of that would have
    the same bytes written again.
    """

    def write(self, data: Any, /) -> int:
        with _named_failure():
            return super().write(data)

    def flush(self) -> None:
        with _named_failure():
            super().flush()


@contextlib.contextmanager
def _named_failure() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputFailed(error.errno, error.strerror) from error
