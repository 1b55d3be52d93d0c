"""Standard output whose reader went away, or that leads to a file that takes no more."""

from __future__ import annotations

import errno
import os
import sys

_TAKES_NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def give_up_output() -> None:
    """Python flushes standard output at exit, and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def output_problem(error: OSError) -> str | None:
    """A sentence where ``error`` is of writing to a stream; None for all that has to do with files by name."""
    if error.errno not in _TAKES_NO_MORE or error.filename is not None:
        return None
    return f"the output cannot be written: {error.strerror}"
