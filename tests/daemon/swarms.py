"""A swarm of daemons as a bystander sees it: the directory, what each daemon says in its log, and its metrics."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from petalsd.swarm.directory import SwarmView, read_view
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan
from tests.control.double import ask
from tests.daemon.measured import Series, parse
from tests.daemon.processes import DaemonProcess
from tests.waiting import eventually

BUSY_S = 60.0  # what a check or a move may take on a machine that has much else to do


class Member:
    """A daemon of the swarm, online once. Log at level debug: it tells of every check then."""

    def __init__(self, daemon: DaemonProcess, online: dict[str, Any], socket: Path) -> None:
        self.daemon = daemon
        self.peer = str(online["peer_id"])
        self.socket = socket

    @property
    def mark(self) -> int:
        """A place in its log."""
        return len(self.daemon.events)

    def events(self, name: str, after: int = 0) -> list[dict[str, Any]]:
        return [event for event in self.daemon.events[after:] if event.get("event") == name]

    def checks(self, after: int = 0) -> list[str]:
        """What its checks of the placement came to."""
        return [event["verdict"] for event in self.events("placement_checked", after)]

    async def until_checked(self, times: int, after: int) -> None:
        await eventually(lambda: len(self.checks(after)) >= times, times * BUSY_S, 0.05)

    async def metrics(self) -> Series:
        return parse((await ask(self.socket, "GET", "/metrics")).body)

    async def kill(self) -> None:
        """As a power cut would."""
        self.daemon.send(signal.SIGKILL)
        await self.daemon.ended()


async def member_of(daemon: DaemonProcess) -> Member:
    """Once it is online."""
    opened = await daemon.event("control_socket_open")
    return Member(daemon, await daemon.online(), Path(opened["path"]))


class Swarm:
    """``node`` is the test's own place in it; no daemon depends on another one."""

    def __init__(self, node: Node, prefix: str, num_blocks: int) -> None:
        self.node = node
        self._prefix = prefix
        self._num_blocks = num_blocks
        self.members: list[Member] = []

    async def start(self, daemons: Sequence[DaemonProcess]) -> None:
        """All at the same moment; returns when all are online."""
        await asyncio.gather(*(daemon.start() for daemon in daemons))
        self.members += await asyncio.gather(*map(member_of, daemons))

    async def view(self, without: Collection[Member] = ()) -> SwarmView:
        """The directory, less the records of some members."""
        view = await read_view(self.node, self._prefix, self._num_blocks)
        return view.without([member.peer for member in without])

    async def at(self, span: BlockSpan) -> list[Member]:
        """Who serves exactly these blocks."""
        spans = {remote.peer: remote.span for remote in (await self.view()).spans()}
        return [member for member in self.members if spans.get(member.peer) == span]

    async def placement(self, without: Collection[Member] = ()) -> Counter[BlockSpan]:
        """How many serve which blocks."""
        return Counter(remote.span for remote in (await self.view(without)).spans())

    async def records(self, member: Member) -> list[ServerRecord | None]:
        """What it announces, block by block."""
        return [records.get(member.peer) for records in (await self.view()).blocks]

    async def until_served(self, without: Collection[Member]) -> None:
        """Until every block is ONLINE at somebody else, and nobody else is on the way to another place."""

        async def is_served() -> bool:
            view = await self.view(without)
            records = [record for block in view.blocks for record in block.values()]
            is_calm = all(record.state is not ServerState.JOINING for record in records)
            return is_calm and not view.missing_blocks()

        await eventually(is_served, 2 * BUSY_S, 0.1)
