"""What a client may be told about waiting, retrying and choosing servers. The defaults suit the public swarm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from petalsd.swarm.directory import RemoteSpan


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Frozen; every wait of the client is bounded by one of these.

    connect_timeout_s    dialing a server and opening a stream
    request_timeout_s    one answer of a server
    silence_s            after so long without an answer its server is pinged, and a ping may take as long; who
                         leaves two in a row unanswered is given up
    recovery_timeout_s   after the first failure of a call, how long it may look for a way on
    max_failures         servers that may fail within one call
    alloc_timeout_s      how long a full server may let us queue for its cache; equals routing's price of it
    relay_above_s        to servers whose pings take as long, steps are handed by the servers before them, too;
                         infinite: never
    refresh_period_s     between two readings of the directory
    max_step_tokens      rows × tokens of one message; smaller than any server's limit on a batch
    max_idle_s           a stream unused for longer is opened anew (servers close theirs after 300 s)
    max_stream_age_s     the same for its whole life (servers: 1800 s)
    allowed_servers      base58 PeerIDs to use and no others; None allows all
    blocked_servers      base58 PeerIDs never to use
    identity_path        private key file, made if missing, for servers that know their clients; None: a new PeerID
                         each time
    adapter              adapter of the servers that all calls ask for, by its name; None: the model as it is
    """

    connect_timeout_s: float = 5.0
    request_timeout_s: float = 180.0
    silence_s: float = 10.0
    recovery_timeout_s: float = 300.0
    max_failures: int = 16
    min_backoff_s: float = 1.0
    max_backoff_s: float = 15.0
    alloc_timeout_s: float = 10.0
    relay_above_s: float = 0.005
    refresh_period_s: float = 60.0
    refresh_timeout_s: float = 30.0
    ping_timeout_s: float = 2.0
    max_pinged: int = 3
    ban_s: float = 15.0
    max_ban_s: float = 3600.0
    max_step_tokens: int = 1024
    max_parallel_passes: int = 8
    max_idle_s: float = 240.0
    max_stream_age_s: float = 1500.0
    allowed_servers: frozenset[str] | None = None
    blocked_servers: frozenset[str] = frozenset()
    identity_path: Path | None = None
    adapter: str | None = None

    def allows(self, peer: str) -> bool:
        """Whether the user lets us use this server."""
        return peer not in self.blocked_servers and (
            self.allowed_servers is None or peer in self.allowed_servers
        )

    def suits(self, server: RemoteSpan) -> bool:
        """Whether it may be used, and has the adapter."""
        has_adapter = self.adapter is None or self.adapter in server.record.adapters
        return has_adapter and self.allows(server.peer)
