"""What a bootstrap node says over its control socket where a server says something else; as ``status``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from petalsd.status import ActiveWarning, Answer, Document, PeerEntry, Span, State


class InitialPeers(Document):
    """The other bootstrap nodes in the configuration."""

    total: int
    known: int = Field(description="that are in the routing table")


class BootstrapWatchdog(Document):
    interval_s: float | None = Field(description="systemd's; null where nobody watches")
    last_ping_s: float | None


class BootstrapStatus(Answer):
    """GET /v1/status of a bootstrap node"""

    role: Literal["bootstrap"] = "bootstrap"
    version: str
    instance: str
    state: State
    reason: str
    summary: str = Field(description="the line that systemctl status shows")
    since_s: float = Field(description="age of the state")
    uptime_s: float
    pid: int
    peer_id: str | None
    maddrs: list[str] = Field(description="for the initial_peers of others")
    is_reachable: bool | None = Field(
        description="what others said who dialled this node; null where nobody could be asked"
    )
    initial_peers: InitialPeers
    known_peers: int = Field(description="in the routing table of the DHT")
    stored_keys: int = Field(description="of the swarm's directory, that are kept here")
    watchdog: BootstrapWatchdog
    warnings: list[ActiveWarning]


class SwarmModel(Document):
    """A model that servers have announced, as ``peers`` of a server."""

    dht_prefix: str = Field(description="name of the model in the swarm")
    repository: str | None
    num_blocks: int
    peers: list[PeerEntry]
    uncovered: list[Span] = Field(description="blocks that no server serves")


class SwarmPeers(Answer):
    """GET /v1/peers of a bootstrap node"""

    models: list[SwarmModel]
