"""Clients that die: their pages are back within a second, whatever they were at."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from pathlib import Path

import pytest
import torch

from petalsd.swarm.node import Node
from petalsd.swarm.stub import InferenceStream
from tests.engine.rig import HookedBlock, TinyModel, states
from tests.swarm.servers import FREED_WITHIN_S, Server, joining, node, server
from tests.swarm.stock import DUMMY, DUMMY_INT64, TIMEOUT_S

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]


async def start(on: Server, client: Node) -> InferenceStream:
    """A session that has stepped once."""
    stream = await on.stub(client).open_inference()
    await stream.send(on.uid, [states(1, 2), DUMMY, DUMMY_INT64], {"max_length": 64})
    assert len(await stream.receive(TIMEOUT_S)) == 1
    return stream


async def freed(by: Server, within_s: float = FREED_WITHIN_S) -> None:
    started = time.monotonic()
    await by.idle()
    assert time.monotonic() - started < within_s


async def test_a_killed_client_frees_its_pages(tiny: Server, nodes: tuple[Node, Node]) -> None:
    """SIGKILL of a client's p2pd: nothing is said any more, and the server notices by itself."""
    async with node(await joining(nodes[0], client_mode=True)) as dying:
        stream = await start(tiny, dying)
        child = dying._daemon._child
        assert child is not None and tiny.pool.stats().sessions == 1
        child.kill()
        await freed(tiny)
        stream.abort()


async def test_a_client_that_leaves_in_mid_step_frees_its_pages(
    nodes: tuple[Node, Node], client: Node, tmp_path: Path
) -> None:
    """The step that runs is finished for nobody, then the pages go back; others are served meanwhile."""
    model = TinyModel(tmp_path)
    is_inside, may_go_on = threading.Event(), threading.Event()
    may_go_on.set()

    def wait(hidden: torch.Tensor) -> None:
        is_inside.set()
        may_go_on.wait(TIMEOUT_S)

    model.blocks = {**model.blocks, 2: HookedBlock(model.blocks[2], wait)}  # type: ignore[dict-item]
    async with node(await joining(nodes[0])) as other, server(other, tmp_path, model=model) as slow:
        stream = await start(slow, client)
        is_inside.clear()
        may_go_on.clear()
        await stream.send("", [states(1, 1), DUMMY, DUMMY_INT64], {})
        assert await asyncio.to_thread(is_inside.wait, TIMEOUT_S)
        stream.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await slow.idle()
        assert slow.pool.stats().sessions == 1  # the engine thread still computes with these pages
        may_go_on.set()
        await freed(slow)
        again = await start(slow, client)
        await again.close()


async def test_many_clients_that_vanish_leave_nothing(tiny: Server, client: Node) -> None:
    """Eight sessions dropped at once, in the middle of their steps."""
    streams = await asyncio.gather(*(start(tiny, client) for _ in range(8)))
    for stream in streams:
        await stream.send("", [states(1, 3), DUMMY, DUMMY_INT64], {})
        stream.abort()
    await freed(tiny)
