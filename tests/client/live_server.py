"""A real server of some blocks: in a thread of the tests, or as a process that a test may kill."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import structlog
import torch
from transformers import LlamaConfig  # noqa: F401 - lazy otherwise, and slow: processes inherit it

from petalsd.client.runtime import ClientRuntime
from petalsd.engine.engine import Engine
from petalsd.engine.limits import EngineLimits
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.sizing import KVGeometry, pages_for
from petalsd.models.architecture import Architecture
from petalsd.models.ladder import Ladder
from petalsd.models.source import ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.swarm.announcer import Announcer, AnnouncerOptions
from petalsd.swarm.handler import TransformerConnectionHandler
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.observer import NullObserver
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.swarm.serving import HandlerLimits, ServedModel, Serving
from petalsd.types import BlockSpan

PREFIX = "live-tiny"
VERSION = "petalsd test"
FAST_RPS, SLOW_RPS = 500.0, 0.5
CPU = torch.device("cpu")
PAGE_TOKENS, KV_TOKENS = 16, 4096


class Pushes(NullObserver):
    """Whether each step that was handed on arrived."""

    def __init__(self) -> None:
        self.arrived: list[bool] = []

    def pushed(self, is_delivered: bool) -> None:
        self.arrived.append(is_delivered)


@dataclass
class LiveServer:
    maddr: str
    node: Node
    engine: Engine
    pool: KVPool
    pushes: Pushes


@contextlib.asynccontextmanager
async def serve_blocks(
    path: str,
    span: BlockSpan,
    initial_peers: tuple[str, ...],
    inference_rps: float,
    dtype: torch.dtype = torch.float32,
) -> AsyncIterator[LiveServer]:
    """Serve ``span`` of the model at ``path`` in ``dtype``, announced with a rate that clients route by."""
    source = ModelSource(path)
    ladder = Ladder(
        Architecture.read(source.config()), source, WeightStorage.choose(dtype, CPU), num_threads=1
    )
    config, blocks = ladder.architecture.config, {index: ladder.load(index) for index in span}
    geometry = KVGeometry(PAGE_TOKENS, config.num_kv_heads, config.head_dim, dtype)
    pool = KVPool(geometry, pages_for(KV_TOKENS, len(span), PAGE_TOKENS), dtype, CPU)
    pool.allocate()
    engine, node = Engine(EngineLimits(), CPU, num_threads=1), Node(NodeOptions(initial_peers=initial_peers))
    served = ServedModel(PREFIX, config.num_blocks, config.hidden_size, dtype, VERSION)

    def record(state: ServerState, blocks: BlockSpan) -> ServerRecord:
        return ServerRecord(
            state,
            10.0,
            blocks,
            version=VERSION,
            inference_rps=inference_rps,
            cache_tokens_left=2 * pool.tokens_free,
        )

    await engine.start()
    await engine.load_span(blocks, pool, ladder.angles)
    await node.start()
    pushes = Pushes()
    handler = TransformerConnectionHandler(node, Serving(engine, served, HandlerLimits(), pushes))
    announcer = Announcer(node, AnnouncerOptions(PREFIX, config.num_blocks), record)
    try:
        await handler.start()
        await announcer.announce(ServerState.ONLINE, span)
        yield LiveServer((await node.visible_maddrs())[0], node, engine, pool, pushes)
        await announcer.announce(ServerState.OFFLINE, span)
    finally:
        await handler.stop()
        await node.stop()
        await engine.stop(deadline_s=10)


@contextlib.contextmanager
def in_threads(
    path: Path,
    *spans: str,
    peers: tuple[str, ...] = (),
    inference_rps: float = FAST_RPS,
    dtype: torch.dtype = torch.float32,
) -> Iterator[list[LiveServer]]:
    """Servers on one loop in the background, joined through ``peers`` or the first of them."""
    with ClientRuntime() as runtime:
        stack = contextlib.AsyncExitStack()
        servers: list[LiveServer] = []
        try:
            for text in spans:
                known = peers or tuple(server.maddr for server in servers[:1])
                serving = serve_blocks(str(path), BlockSpan.parse(text), known, inference_rps, dtype)
                servers.append(runtime.run(stack.enter_async_context(serving)))
            yield servers
        finally:
            runtime.run(stack.aclose())


class ServerProcess:
    """The same as a process of its own, to be ended by SIGKILL. Forked from one that has imported everything."""

    def __init__(self, path: Path, span: str, *peers: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_run_process, args=(theirs, str(path), span, peers), daemon=True
        )
        self._process.start()
        theirs.close()
        self.maddr: str = self._ours.recv()

    @property
    def peer(self) -> str:
        return self.maddr.rpartition("/")[2]

    def freeze(self) -> None:
        """It does nothing any more, but its libp2p daemon keeps all connections open."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(10)

    def close(self) -> None:
        self.kill()
        self._ours.close()


def _run_process(parent: Connection, path: str, span: str, peers: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(_serve_for(parent, path, span, peers))


async def _serve_for(parent: Connection, path: str, span: str, peers: tuple[str, ...]) -> None:
    """Tell the parent our address and serve until it is gone."""
    async with serve_blocks(path, BlockSpan.parse(span), peers, FAST_RPS) as server:
        parent.send(server.maddr)
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(parent.recv)
