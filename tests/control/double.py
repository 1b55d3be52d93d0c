"""A daemon that says what a test told it to, and a client that sends any bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petalsd.control.api import Operation
from petalsd.paths import unix_address
from petalsd.status import Peers, Plan, Progress, Reloaded, Sessions, Status
from petalsd.types import BlockSpan
from tests.cli.petalsctl.documents import PEERS, PLAN, PROGRESS, SESSIONS, STATUS

DEADLINE_S = 20.0


@dataclass
class DaemonDouble:
    """``calls`` are the operations as they came; ``failures`` are raised by the one of that name.

    ``progresses`` are handed out one by one, the last one for good.
    """

    calls: list[tuple[str, object]] = field(default_factory=list)
    failures: dict[str, BaseException] = field(default_factory=dict)
    progresses: list[Mapping[str, Any]] = field(default_factory=lambda: [PROGRESS | {"done": True}])
    state: str = "online"
    problem: str | None = None
    is_ready: bool = True
    delay_s: float = 0.0

    def _call(self, name: str, argument: object = None) -> None:
        self.calls.append((name, argument))
        if name in self.failures:
            raise self.failures[name]

    def status(self) -> Status:
        self._call("status")
        return Status.model_validate(STATUS | {"state": self.state})

    def sessions(self) -> Sessions:
        self._call("sessions")
        return Sessions.model_validate(SESSIONS)

    async def peers(self) -> Peers:
        self._call("peers")
        await asyncio.sleep(self.delay_s)
        return Peers.model_validate(PEERS)

    async def plan(self, to: BlockSpan | None) -> Plan:
        self._call("plan", to)
        return Plan.model_validate(PLAN)

    async def rebalance(self, to: BlockSpan | None) -> Plan:
        self._call("rebalance", to)
        return Plan.model_validate(PLAN)

    async def drain(self, deadline_s: float | None) -> None:
        self._call("drain", deadline_s)

    async def resume(self) -> None:
        self._call("resume")

    async def reload(self) -> Reloaded:
        self._call("reload")
        return Reloaded(applied=["daemon.log_level"], needs_restart=[])

    def progress(self, operation: Operation) -> Progress:
        now = self.progresses.pop(0) if len(self.progresses) > 1 else self.progresses[0]
        return Progress.model_validate({**now, "operation": operation})

    @property
    def acts(self) -> list[tuple[str, object]]:
        """The calls that change something."""
        return [call for call in self.calls if call[0] in ("drain", "resume", "reload", "rebalance")]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def send(path: Path, data: bytes, *, is_open: bool = False) -> bytes:
    """All that comes back for these bytes; the sending side is closed behind them unless it ``is_open``."""
    with unix_address(path) as address:
        reader, writer = await asyncio.open_unix_connection(address)
    try:
        async with asyncio.timeout(DEADLINE_S):
            try:
                writer.write(data)
                await writer.drain()
                if not is_open:
                    writer.write_eof()
            except OSError:
                pass  # refused before all was sent: what matters is the answer
            return await _read_all(reader)
    finally:
        writer.close()


async def ask(path: Path, method: str, target: str, body: object = None) -> Answer:
    """One well-formed request; ``body`` bytes go as they are, anything else as JSON."""
    payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
    return parse(await send(path, head.encode() + payload, is_open=True))


def parse(raw: bytes) -> Answer:
    """The first answer of ``raw``; a chunked body is put together."""
    head, separator, body = raw.partition(b"\r\n\r\n")
    assert separator, f"no HTTP answer: {raw[:200]!r}"
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunked(body)
    return Answer(int(first.split()[1]), headers, body)


def _unchunked(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        body, data = body + rest[:length], rest[length + 2 :] if length else b""
    return body


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    """Up to the end; a connection that is reset has said all it will."""
    data = b""
    try:
        while chunk := await reader.read(65536):
            data += chunk
    except ConnectionError:
        pass
    return data
