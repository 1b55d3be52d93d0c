"""`petalsd run` in a process forked from one that has the imports behind it: they are most of a daemon's start.

From there on all is as `python -m petalsd` has it: an environment and standard streams of its own, its signals,
its exit status.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from typing import Any

import pytest

from petalsd.cli.main import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["petalsd.daemon.assembly", "transformers.activations", "uvloop"])
_STDIN_FD, _STDERR_FD = 0, 2


class ForkedProcess:
    """What is used of asyncio.subprocess.Process."""

    def __init__(self, process: ForkServerProcess, stderr: asyncio.StreamReader) -> None:
        self._process = process
        self.stderr = stderr

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Less than 0: the signal that ended it."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        self._process.join()
        assert self.returncode is not None
        return self.returncode


async def fork_petalsd(words: Sequence[str], environ: Mapping[str, str]) -> ForkedProcess:
    """``petalsd WORDS`` with standard error in a pipe. Whoever comes first waits for the imports."""
    _ensure_running(environ)
    ours, its = os.pipe()
    stderr = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stderr), os.fdopen(ours, "rb", buffering=0)
    )
    try:
        process = await asyncio.to_thread(_start, words, environ, its)
    finally:
        os.close(its)
    return ForkedProcess(process, stderr)


def _ensure_running(environ: Mapping[str, str]) -> None:
    """Some variables are read when libraries are imported: those of the first one have to do for all."""
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(environ):
            patch.delenv(name)
        for name, value in environ.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def _start(words: Sequence[str], environ: Mapping[str, str], stderr: int) -> ForkServerProcess:
    process = _CONTEXT.Process(target=_Petalsd(words, environ, stderr))
    process.start()
    return process


class _Petalsd:
    """Sent to the new process, with the descriptor."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str], stderr: int) -> None:
        self._words, self._environ, self._stderr = list(words), dict(environ), stderr

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stderr": DupFd(self._stderr)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "_stderr": state["_stderr"].detach()})

    def __call__(self) -> None:
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, place in ((nothing, _STDIN_FD), (self._stderr, _STDERR_FD)):
            os.dup2(descriptor, place)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(self._environ)
        sys.exit(main(self._words))
