"""A real server of some blocks: in a thread of the tests, or as a process that a test may kill.

``python -m tests.client.live_server MODEL START:END [PEER ...]`` prints its address when it serves and runs until
its standard input closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from petalsd.client.runtime import ClientRuntime
from petalsd.engine.engine import Engine
from petalsd.engine.limits import EngineLimits
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.sizing import KVGeometry, pages_for
from petalsd.models.block_config import BlockConfig
from petalsd.models.rope import Rope
from petalsd.models.source import ModelSource
from petalsd.models.weights import load_block
from petalsd.swarm.announcer import Announcer, AnnouncerOptions
from petalsd.swarm.handler import TransformerConnectionHandler
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.swarm.serving import HandlerLimits, ServedModel, Serving
from petalsd.types import BlockSpan

PREFIX = "live-tiny"
CPU = torch.device("cpu")
PAGE_TOKENS, KV_TOKENS = 16, 4096


@dataclass
class LiveServer:
    maddr: str
    node: Node
    engine: Engine
    pool: KVPool


@contextlib.asynccontextmanager
async def serve_blocks(
    path: str, span: BlockSpan, initial_peers: tuple[str, ...], version: str = "petalsd test"
) -> AsyncIterator[LiveServer]:
    """Serve ``span`` of the model at ``path`` in float32, announced."""
    source = ModelSource(path)
    config = BlockConfig.from_hf(source.config())
    rope = Rope(config, torch.float32, CPU)
    blocks = {i: load_block(source, config, i, torch.float32, CPU, rope=rope) for i in span}
    geometry = KVGeometry(PAGE_TOKENS, config.num_kv_heads, config.head_dim, dtype_bytes=4)
    pool = KVPool(geometry, pages_for(KV_TOKENS, len(span), PAGE_TOKENS), torch.float32, CPU)
    pool.allocate()
    engine, node = Engine(EngineLimits(), CPU, num_threads=1), Node(NodeOptions(initial_peers=initial_peers))
    served = ServedModel(PREFIX, config.num_blocks, config.hidden_size, torch.float32, version)

    def record(state: ServerState, blocks: BlockSpan) -> ServerRecord:
        return ServerRecord(
            state, 10.0, blocks, version=version, inference_rps=500.0, cache_tokens_left=2 * pool.tokens_free
        )

    await engine.start()
    await engine.load_span(blocks, pool, rope)
    await node.start()
    handler = TransformerConnectionHandler(node, Serving(engine, served, HandlerLimits()))
    announcer = Announcer(node, AnnouncerOptions(PREFIX, config.num_blocks), record)
    try:
        await handler.start()
        await announcer.announce(ServerState.ONLINE, span)
        yield LiveServer((await node.visible_maddrs())[0], node, engine, pool)
        await announcer.withdraw()
    finally:
        await handler.stop()
        await node.stop()
        await engine.stop(deadline_s=10)


@contextlib.contextmanager
def in_threads(path: Path, *spans: str) -> Iterator[list[LiveServer]]:
    """Servers on one loop in the background, the later ones joined through the first."""
    with ClientRuntime() as runtime:
        stack = contextlib.AsyncExitStack()
        servers: list[LiveServer] = []
        try:
            for text in spans:
                peers = (servers[0].maddr,) if servers else ()
                serving = serve_blocks(str(path), BlockSpan.parse(text), peers)
                servers.append(runtime.run(stack.enter_async_context(serving)))
            yield servers
        finally:
            runtime.run(stack.aclose())


class ServerProcess:
    """The same as a process of its own, ended by SIGKILL."""

    def __init__(self, path: Path, span: str, *peers: str) -> None:
        command = [sys.executable, "-m", "tests.client.live_server", str(path), span, *peers]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.maddr = ""

    def wait_ready(self) -> str:
        """Its address, once it serves."""
        assert self._process.stdout is not None
        self.maddr = self._process.stdout.readline().strip()
        assert self.maddr.startswith("/"), "the server process did not start"
        return self.maddr

    @property
    def peer(self) -> str:
        return self.maddr.rpartition("/")[2]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


async def _main(path: str, span: str, *peers: str) -> None:
    torch.set_num_threads(1)
    async with serve_blocks(path, BlockSpan.parse(span), peers) as server:
        sys.stdout.write(f"{server.maddr}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


def run_main(arguments: list[Any]) -> None:
    asyncio.run(_main(*arguments))


if __name__ == "__main__":
    run_main(sys.argv[1:])
