"""What the control socket asks of the daemon; tests put a double in its place."""

from __future__ import annotations

from typing import Literal, Protocol

from petalsd.bootstrap_status import BootstrapStatus, SwarmPeers
from petalsd.status import Peers, Plan, Progress, Reloaded, Sessions, Status
from petalsd.types import BlockSpan

Operation = Literal["drain", "resume", "rebalance"]


class DaemonApi(Protocol):
    """Of every daemon. PetalsdError for what cannot be done now; its code decides the HTTP status."""

    def status(self) -> Status | BootstrapStatus: ...

    async def peers(self) -> Peers | SwarmPeers:
        """Reads the directory of the swarm."""

    async def reload(self) -> Reloaded: ...

    @property
    def problem(self) -> str | None:
        """Why the process should be restarted; None while it is well."""

    @property
    def is_ready(self) -> bool:
        """Whether it does what it is there for: of a server, whether new sessions are taken."""


class ServerApi(DaemonApi, Protocol):
    """Of a daemon that serves blocks."""

    def sessions(self) -> Sessions: ...

    async def plan(self, to: BlockSpan | None) -> Plan:
        """What ``rebalance`` would do now; nothing changes."""

    async def rebalance(self, to: BlockSpan | None) -> Plan:
        """Returns when leaving has begun, or nothing is to be done (``would_move`` is false)."""

    async def drain(self, deadline_s: float | None) -> None:
        """Returns when OFFLINE is announced and new sessions are refused."""

    async def resume(self) -> None:
        """Returns when ONLINE is announced."""

    def progress(self, operation: Operation) -> Progress:
        """How far an operation that has begun is."""
