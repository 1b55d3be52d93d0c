"""petalsd with faults built in: a signal sets one off in the process that runs.

SIGUSR1     the event loop blocks for good
SIGUSR2     the engine thread blocks for good at its next batch
SIGRTMIN+2  the device is lost at the next batch: every call to it fails from then on
SIGRTMIN+1  the interpreter's lock is never given back: no thread of Python runs any more

The environment variable FAULTY_TOKEN_S makes the device slow: so many seconds for each token of a batch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

import torch

from petalsd.cli.main import main
from petalsd.engine.batch import BatchItem
from petalsd.engine.runner import SpanRunner

_FOREVER_S = 3600

_is_engine_blocked = threading.Event()
_is_device_lost = threading.Event()
_compute = SpanRunner.run


def compute_faultily(runner: SpanRunner, items: Sequence[BatchItem]) -> list[torch.Tensor]:
    """In place of ``SpanRunner.run``, on the engine thread."""
    if _is_engine_blocked.is_set():
        time.sleep(_FOREVER_S)
    if _is_device_lost.is_set():
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    num_tokens = sum(item.rows * item.tokens for item in items)
    time.sleep(float(os.environ.get("FAULTY_TOKEN_S", "0")) * num_tokens)
    return _compute(runner, items)


def block_loop(number: int, frame: FrameType | None) -> None:
    """Python's handlers run on the main thread, which is the loop's."""
    time.sleep(_FOREVER_S)


def block_engine(number: int, frame: FrameType | None) -> None:
    _is_engine_blocked.set()


def lose_device(number: int, frame: FrameType | None) -> None:
    _is_device_lost.set()


def keep_interpreter_lock(number: int, frame: FrameType | None) -> None:
    ctypes.PyDLL(None).sleep(_FOREVER_S)


if __name__ == "__main__":
    SpanRunner.run = compute_faultily  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, block_loop)
    signal.signal(signal.SIGUSR2, block_engine)
    signal.signal(signal.SIGRTMIN + 2, lose_device)
    signal.signal(signal.SIGRTMIN + 1, keep_interpreter_lock)
    sys.exit(main())
