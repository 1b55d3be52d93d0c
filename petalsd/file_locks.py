"""Locks on open files, between processes: each is released with its file, also when the process dies."""

from __future__ import annotations

import fcntl
import time

_POLL_S = 0.2


def try_lock(descriptor: int) -> bool:
    """Take the lock of an open file if it is free. OSError where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_within(descriptor: int, timeout_s: float) -> bool:
    """Wait for the lock, at most so long; whether it was taken. OSError as above."""
    deadline = time.monotonic() + timeout_s
    while not try_lock(descriptor):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
