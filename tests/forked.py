"""`petalsd` in a process forked from one that has the imports behind it: they are most of a daemon's start.

From there on all is as `python -m petalsd` has it: an environment and standard streams of its own, its signals,
its exit status.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from typing import Any

import pytest

from petalsd.cli.main import main

_CONTEXT = multiprocessing.get_context("forkserver")
# What a first start compares with comes in late, and in each home of a test the start is a first one.
_CONTEXT.set_forkserver_preload(
    [
        "petalsd.daemon.assembly",
        "uvloop",
        "transformers.models.llama.modeling_llama",
        "transformers.masking_utils",
    ]
)


class ForkedProcess:
    """What the tests use of subprocess.Popen."""

    stdin = None

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Less than 0: the signal that ended it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def prepare_to_fork() -> None:
    """Begin to import. Kernels are not to be interpreted in whoever is forked: that is decided by then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        forkserver.ensure_running()


def fork_petalsd(
    words: Sequence[str], environ: Mapping[str, str], output: int, *, is_group: bool = False
) -> ForkedProcess:
    """``petalsd WORDS`` with both outputs going to a descriptor, in a process group of its own if that is wanted.

    Waits for the imports the first time.
    """
    prepare_to_fork()
    process = _CONTEXT.Process(target=_Petalsd(words, environ, output, is_group), name=f"petalsd {words[0]}")
    process.start()
    return ForkedProcess(process)


class _Petalsd:
    """Sent to the new process, with the descriptor."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str], output: int, is_group: bool) -> None:
        self._words, self._environ, self._is_group = list(words), dict(environ), is_group
        self._output = output

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_output": DupFd(self._output)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "_output": state["_output"].detach()})

    def __call__(self) -> None:
        if self._is_group:
            os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for stream, descriptor in enumerate((nothing, self._output, self._output)):
            os.dup2(descriptor, stream)
        os.close(self._output)
        os.close(nothing)
        os.environ.clear()
        os.environ.update(self._environ)
        sys.exit(main(self._words))
