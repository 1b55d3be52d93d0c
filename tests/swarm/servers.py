"""A server of a tiny model in a swarm of two nodes on loopback: real p2pd, real engine, real weights."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from petalsd.engine.engine import Engine
from petalsd.engine.limits import EngineLimits
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.prefixes import PrefixCache
from petalsd.kvcache.waiting import AdmissionRules
from petalsd.swarm.handler import TransformerConnectionHandler
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.observer import SwarmObserver
from petalsd.swarm.protocol import make_chain
from petalsd.swarm.serving import HandlerLimits, ServedModel, Serving
from petalsd.swarm.stub import ServerStub
from petalsd.types import BlockSpan
from tests.engine.rig import CPU, TinyModel
from tests.swarm.stock import StockSession, stock_stub
from tests.waiting import eventually

PREFIX = "tiny-hf"
FREED_WITHIN_S = 1.0  # what is promised for a client that dies


@dataclass
class Server:
    """One node that serves blocks 0:4 of a tiny model, and how to reach it from another."""

    node: Node
    model: TinyModel
    engine: Engine
    serving: Serving
    handler: TransformerConnectionHandler
    pool: KVPool
    span: BlockSpan = field(default_factory=lambda: BlockSpan(0, 4))

    @property
    def uid(self) -> str:
        return make_chain(PREFIX, self.span)

    def stub(self, client: Node) -> ServerStub:
        return ServerStub(client, self.node.peer_id)

    def stock(self, client: Node) -> Any:
        return stock_stub(client, self.node.peer_id)

    async def stock_session(self, client: Node) -> StockSession:
        return await StockSession(self.stock(client)).open()

    async def idle(self) -> None:
        """Return when no session holds a page and the pool is sound; TimeoutError when that takes too long."""
        await eventually(
            lambda: not (self.pool.stats().sessions or self.handler.num_streams),
            timeout_s=FREED_WITHIN_S + 1.0,
            interval_s=0.01,
        )
        self.pool.check_integrity()
        stats = self.pool.stats()
        assert (stats.pages_reserved, stats.pages_mapped, stats.waiters) == (0, 0, 0)


@contextlib.asynccontextmanager
async def node(options: NodeOptions | None = None) -> AsyncIterator[Node]:
    started = Node(options or NodeOptions())
    await started.start()
    try:
        yield started
    finally:
        await started.stop()


async def joining(first: Node, **changes: Any) -> NodeOptions:
    """Options of a node that joins through ``first``."""
    return replace(NodeOptions(initial_peers=tuple(await first.visible_maddrs())), **changes)


@contextlib.asynccontextmanager
async def server(
    on: Node,
    path: Path,
    engine_limits: EngineLimits | None = None,
    limits: HandlerLimits | None = None,
    kv_tokens: int = 512,
    model: TinyModel | None = None,
    observer: SwarmObserver | None = None,
    max_peer_share: float = 1.0,
    allowed_peers: Collection[str] = (),
    prefixes: PrefixCache | None = None,
) -> AsyncIterator[Server]:
    """Serve a tiny Llama on a started node; at the end everything must be given back."""
    model = model or TinyModel(path)
    engine = Engine(engine_limits or EngineLimits(), CPU, num_threads=1)
    pool = model.pool(kv_tokens, rules=AdmissionRules(max_peer_share=max_peer_share))
    await engine.start()
    await engine.load_span(model.blocks, pool, model.rope)
    config = model.config
    served = ServedModel(PREFIX, config.num_blocks, config.hidden_size, pool.dtype, "0.1.0")
    serving = Serving(engine, served, limits or HandlerLimits(), observer, allowed_peers, prefixes)
    handler = TransformerConnectionHandler(on, serving)
    await handler.start()
    running = Server(on, model, engine, serving, handler, pool)
    try:
        yield running
        await running.idle()
    finally:
        await handler.stop()
        await engine.stop(deadline_s=10)
