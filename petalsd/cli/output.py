"""Standard output whose reader went away, or that leads to a file that takes no more."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class OutputFailed(OSError):
    """Standard output cannot be written; whatever else fails is an OSError of another kind."""

    def __str__(self) -> str:
        return f"the output cannot be written: {self.strerror}"


@contextlib.contextmanager
def watched_output() -> Iterator[None]:
    """Standard output raises OutputFailed, or BrokenPipeError where its reader left.

    It has a buffer: with PYTHONUNBUFFERED nothing under it goes on with what a pipe did not take at once, so a
    long answer would end early, and nobody would hear that its reader left.
    """
    given = sys.stdout
    try:
        raw = _Output(given.fileno(), "w", closefd=False)
    except io.UnsupportedOperation:  # no file, but something in memory
        yield
        return
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw), given.encoding, given.errors, line_buffering=bool(given.line_buffering)
    )
    try:
        yield
        sys.stdout.flush()
    except (OutputFailed, BrokenPipeError):
        give_up_output()
        raise
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stdout = given


def give_up_output() -> None:
    """What is still in its buffer goes nowhere; else Python, which writes that at exit, would complain again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class _Output(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputFailed(error.errno, error.strerror) from error
