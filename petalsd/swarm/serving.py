"""What the handlers serve and within which bounds; shared by all calls of one node."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from petalsd.engine.engine import Engine
from petalsd.errors import Draining, NotAllowed
from petalsd.kvcache.prefixes import PrefixCache
from petalsd.swarm.observer import NullObserver, SwarmObserver


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model, as far as the wire shows it. ``num_blocks`` counts all its layers, not those served here."""

    prefix: str
    num_blocks: int
    hidden_size: int
    dtype: torch.dtype
    version: str


@dataclass(frozen=True, slots=True)
class HandlerLimits:
    """Seconds that calls may take, and how many streams may be open at once.

    request_timeout_s    a whole forward, backward or push call
    push_timeout_s       handing an answer to the next server, which gets the same from the client soon after
    step_timeout_s       waiting for the next step of a session
    session_timeout_s    a whole session
    max_alloc_timeout_s  what ``alloc_timeout`` is capped at
    """

    request_timeout_s: float = 180.0
    push_timeout_s: float = 5.0
    step_timeout_s: float = 300.0
    session_timeout_s: float = 1800.0
    max_alloc_timeout_s: float = 600.0
    max_streams: int = 2048
    max_streams_per_peer: int = 512


class Serving:
    """The engine behind the handlers, who is told of their calls, and whether new work is taken.

    ``allowed_peers``: the clients (base58 PeerIDs) whose work is taken; empty: everybody's. ``prefixes``: where
    beginnings of their prompts are kept, by default nowhere.
    """

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        limits: HandlerLimits,
        observer: SwarmObserver | None = None,
        allowed_peers: Collection[str] = (),
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.engine = engine
        self.model = model
        self.limits = limits
        self.observer = observer or NullObserver()
        self.prefixes = prefixes or PrefixCache(0)
        self._allowed_peers = frozenset(allowed_peers)
        self._refusal: str | None = None

    def refuse(self, reason: str) -> None:
        """From now on new sessions and passes get Draining with ``reason``; open sessions go on."""
        self._refusal = reason

    def serve(self) -> None:
        """Take new work again."""
        self._refusal = None

    def check_allowed(self, client: str) -> None:
        """NotAllowed for a client that may not use this server."""
        if self._allowed_peers and client not in self._allowed_peers:
            raise NotAllowed(f"{client} may not use this server", hint="use another server")

    def check_open(self, client: str) -> None:
        """NotAllowed for a client that may not use this server, Draining while new work is refused."""
        self.check_allowed(client)
        if self._refusal is not None:
            raise Draining(self._refusal, hint="use another server")
