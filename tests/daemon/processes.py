"""`petalsd run` as a process of its own, watched through its JSON log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from petalsd.swarm.node import Node
from tests.device import DEVICE
from tests.forked import ForkedProcess, fork_petalsd, prepare_to_fork

START_S = 180
# Compiled kernels, where it is not said to be elsewhere, lie in a home, and those of tests are empty.
_KEPT = {name: os.environ[name] for name in ("TRITON_CACHE_DIR",) if name in os.environ}
_Process = subprocess.Popen[bytes] | ForkedProcess


class DaemonProcess:
    """Start it, wait for events of its log, send signals, wait for its end."""

    def __init__(self, name: str, home: Path, *overrides: str) -> None:
        self.name = name
        self.home = home
        self.overrides = list(overrides)
        self.events: list[dict[str, Any]] = []
        self._process: _Process | None = None
        self._pipe: asyncio.ReadTransport | None = None
        self._reading: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """What a user's own start would spend on imports is already spent; see start_program."""
        if DEVICE.type == "cpu":
            prepare_to_fork()
            await self._start(self._fork)
        else:  # a process that has asked for its devices cannot be forked
            await self.start_program()

    async def start_program(self) -> None:
        """`python -m petalsd`, as users do it."""
        await self._start(self._execute)

    async def _start(self, start: Callable[[int], _Process]) -> None:
        ours, its = os.pipe()
        output = asyncio.StreamReader()
        self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(ours, "rb", buffering=0)
        )
        try:
            self._process = await asyncio.to_thread(start, its)
        finally:
            os.close(its)
        self._reading = asyncio.create_task(self._read(output))

    def _execute(self, output: int) -> _Process:
        return subprocess.Popen(
            [sys.executable, "-m", "petalsd", *self._words()],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environ(),
        )  # fmt: skip

    def _fork(self, output: int) -> _Process:
        return fork_petalsd(self._words(), self._environ(), output)

    def _words(self) -> list[str]:
        return ["run", "--instance", self.name, *(f"--set={override}" for override in self.overrides)]

    def _environ(self) -> dict[str, str]:
        return {"HOME": str(self.home), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1",
                "CONFIGURATION_DIRECTORY": str(self.home), **_KEPT}  # fmt: skip

    async def event(
        self, name: str, *, after: int = 0, matching: Callable[[dict[str, Any]], bool] = lambda event: True
    ) -> dict[str, Any]:
        """The first event of that name at or past index ``after`` that matches; fails with the log at the end."""
        async with asyncio.timeout(START_S):
            while True:
                for event in self.events[after:]:
                    if event.get("event") == name and matching(event):
                        return event
                assert self._reading is not None
                if self._reading.done():
                    raise AssertionError(f"{self.name} ended before {name!r}:\n{self.text()}")
                await self._changed.wait()

    async def online(self) -> dict[str, Any]:
        return await self.event("online")

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self) -> int:
        """The exit status."""
        assert self._process is not None
        assert self._reading is not None
        async with asyncio.timeout(30):
            await self._reading
        return await asyncio.to_thread(self._process.wait, 30)

    async def end(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(self._process.wait, 30)
        if self._reading is not None:
            await self._reading
        if self._pipe is not None:
            self._pipe.close()

    def text(self) -> str:
        return "\n".join(json.dumps(event) for event in self.events[-30:])

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def _read(self, output: asyncio.StreamReader) -> None:
        while line := await output.readline():
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": "text", "text": line.decode(errors="replace").rstrip()}
            self.events.append(event)
            self._changed.set()
            self._changed = asyncio.Event()
        self._changed.set()


Launch = Callable[..., DaemonProcess]


@contextlib.asynccontextmanager
async def launching(home: Path, node: Node, model_dir: Path) -> AsyncIterator[Launch]:
    """Makes daemons that join through ``node``; ends them all."""
    daemons: list[DaemonProcess] = []
    maddr = (await node.visible_maddrs())[0]

    def make(name: str, *overrides: str) -> DaemonProcess:
        daemon = DaemonProcess(
            name, home, f"model.source={model_dir}", "model.dtype=float32", f"engine.device={DEVICE}",
            "engine.kv_tokens=256", "engine.threads=1", "swarm.throughput=10", f"swarm.initial_peers={maddr}",
            "swarm.host_maddrs=/ip4/127.0.0.1/tcp/0", "blocks.join_delay_s=0.1", *overrides,
        )  # fmt: skip
        daemons.append(daemon)
        return daemon

    try:
        yield make
    finally:
        await asyncio.gather(*(daemon.end() for daemon in daemons))


def child_pids(pid: int) -> list[int]:
    """Direct children of a process."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
