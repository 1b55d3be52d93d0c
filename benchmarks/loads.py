"""Sessions that decode at once, driven by one of three clients: the bare wire, petalsd's client, Petals' client.

A load feeds random states, so that only blocks, servers and client libraries are measured, not a language model's
head. The bare wire costs least and shows the most of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from benchmarks.providers import DHT_PREFIX, Fleet, Provider
from benchmarks.report import OURS, PETALS
from benchmarks.wire import connect
from petalsd.client.options import ClientOptions
from petalsd.client.runtime import ClientRuntime
from petalsd.client.swarm_client import SwarmClient
from tests.interop.stock import StockClient

Step: TypeAlias = Callable[[torch.Tensor], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class LoadShape:
    """``sessions`` of batch 1, each with ``prefill`` tokens behind it, that may take ``max_steps`` steps."""

    sessions: int
    prefill: int
    max_steps: int

    @property
    def max_length(self) -> int:
        return self.prefill + self.max_steps


class Load(Protocol):
    """Open sessions."""

    def decode(self, steps: int) -> float:
        """All sessions take ``steps`` steps at once, each as soon as its last one is answered; seconds."""


class AsyncLoad:
    """Sessions that live in one loop."""

    def __init__(self, runtime: ClientRuntime, steps: Sequence[Step], hidden_size: int) -> None:
        self._runtime = runtime
        self._steps = steps
        self._hidden_size = hidden_size

    def prefill(self, tokens: int) -> None:
        self._runtime.run(self._feed(1, tokens))

    def decode(self, steps: int) -> float:
        return self._runtime.run(self._feed(steps, 1))

    async def _feed(self, count: int, tokens: int) -> float:
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for step in self._steps:
                group.create_task(self._feed_one(step, count, tokens))
        return time.perf_counter() - started

    async def _feed_one(self, step: Step, count: int, tokens: int) -> None:
        for _ in range(count):
            await step(torch.randn(1, tokens, self._hidden_size))


@contextmanager
def wire_load(provider: Provider, shape: LoadShape, fleet: Fleet) -> Iterator[Load]:
    """Streams of the smallest client that there is."""

    async def open_streams(stack: contextlib.AsyncExitStack) -> list[Step]:
        connection = await stack.enter_async_context(connect(provider.maddr))
        return [
            (await stack.enter_async_context(connection.stream(provider.uid, shape.max_length))).step
            for _ in range(shape.sessions)
        ]

    with _in_loop(open_streams, provider, shape) as load:
        yield load


@contextmanager
def petalsd_load(
    provider: Provider, shape: LoadShape, fleet: Fleet, options: ClientOptions | None = None
) -> Iterator[Load]:
    """Inference sessions of petalsd's client, all of one node."""

    async def open_sessions(stack: contextlib.AsyncExitStack) -> list[Step]:
        client = SwarmClient(DHT_PREFIX, len(provider.job.span), [provider.maddr], options)
        await stack.enter_async_context(client)
        sessions = [client.session(shape.max_length) for _ in range(shape.sessions)]
        return [(await stack.enter_async_context(session)).step for session in sessions]

    with _in_loop(open_sessions, provider, shape) as load:
        yield load


@contextmanager
def _in_loop(
    open_all: Callable[[contextlib.AsyncExitStack], Awaitable[list[Step]]],
    provider: Provider,
    shape: LoadShape,
) -> Iterator[Load]:
    stack = contextlib.AsyncExitStack()

    async def enter() -> list[Step]:
        return await open_all(stack)

    with ClientRuntime() as runtime:
        try:
            load = AsyncLoad(runtime, runtime.run(enter()), provider.hidden_size)
            load.prefill(shape.prefill)
            yield load
        finally:
            runtime.run(stack.aclose())


class StockLoad:
    """Inference sessions of the stock client, one thread for each, all in one process of its environment."""

    def __init__(self, client: StockClient, swarm: dict[str, Any]) -> None:
        self._client = client
        self._swarm = swarm

    def decode(self, steps: int) -> float:
        return float(self._client.call("decode", swarm=self._swarm, steps=steps)["seconds"])


@contextmanager
def stock_load(provider: Provider, shape: LoadShape, fleet: Fleet) -> Iterator[Load]:
    client, swarm = fleet.stock_client, provider.swarm
    client.call(
        "open_sessions", swarm=swarm, sessions=shape.sessions, prefill=shape.prefill,
        max_length=shape.max_length,
    )  # fmt: skip
    try:
        yield StockLoad(client, swarm)
    finally:
        client.call("close_sessions", swarm=swarm)


LOADS: dict[str, Callable[[Provider, LoadShape, Fleet], AbstractContextManager[Load]]] = {
    "wire": wire_load,
    OURS: petalsd_load,
    PETALS: stock_load,
}


def clients(*, with_stock: bool) -> list[str]:
    """Those that can be had: the stock one needs its environment."""
    return [name for name in LOADS if with_stock or name != PETALS]
