"""Three petalsd and three stock servers, each by its own rule, come to rest and stay."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from petalsd.swarm.directory import SwarmView, read_view
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan
from tests.interop.child import Child
from tests.interop.daemon import DaemonOptions, ForkedDaemon, daemon_process
from tests.interop.models import Model, random_llama
from tests.interop.stock import ServerOptions, server_process
from tests.waiting import eventually

pytestmark = [pytest.mark.interop, pytest.mark.swarm, pytest.mark.nightly, pytest.mark.timeout(600)]

NUM_BLOCKS, PERIOD_S, CHECKS = 6, 1.0, 20
CONVERGE_S, STAY_S = 300.0, 200.0
_CHECK = re.compile(r'^placement checked: |"event": ?"placement_checked"', re.MULTILINE)
# A check that found a better place, for now or for later, and what comes of it.
_RESTLESS = re.compile(
    r'^placement checked: moves|"verdict": ?"(?!fits|too_dear)|"event": ?"(?:moving|leaving)"', re.MULTILINE
)


@dataclass(frozen=True)
class Server:
    """Of either kind, as its output tells."""

    child: Child

    @property
    def checks(self) -> int:
        return len(_CHECK.findall(self.child.output()))

    @property
    def wishes(self) -> int:
        """How often it moved, or would have liked to."""
        return len(_RESTLESS.findall(self.child.output()))


class MixedSwarm:
    """``node`` is the test's own place in it."""

    def __init__(self, node: Node, prefix: str, servers: list[Server]) -> None:
        self._node = node
        self._prefix = prefix
        self.servers = servers

    async def view(self) -> SwarmView:
        return await read_view(self._node, self._prefix, NUM_BLOCKS)

    async def placement(self) -> dict[str, BlockSpan] | None:
        """Who serves what, by peer; None while somebody loads or is missing, or a block is served by nobody."""
        view = await self.view()
        online = {remote.peer: remote.span for remote in view.spans(ServerState.ONLINE)}
        states = {record.state for records in view.blocks for record in records.values()}
        is_whole = len(online) == len(self.servers) and not view.missing_blocks()
        return online if is_whole and ServerState.JOINING not in states else None

    def wishes(self) -> list[int]:
        return [server.wishes for server in self.servers]

    async def until_checked(self, times: int, timeout_s: float) -> None:
        """Until every server has looked that often at its place."""
        goals = [server.checks + times for server in self.servers]
        await self._eventually(
            lambda: all(one.checks >= goal for one, goal in zip(self.servers, goals, strict=True)), timeout_s
        )

    async def until_at_rest(self) -> dict[str, BlockSpan]:
        """Until every server has looked at a placement that is whole, and wants no other; that placement."""
        found: dict[str, BlockSpan] = {}

        async def is_at_rest() -> bool:
            nonlocal found
            before, wishes = await self.placement(), self.wishes()
            if before is None:
                return False
            await self.until_checked(2, STAY_S)  # the first may have begun before
            found = before
            return self.wishes() == wishes and await self.placement() == before

        await self._eventually(is_at_rest, CONVERGE_S)
        return found

    async def _eventually(self, condition: Callable[[], bool | Awaitable[bool]], timeout_s: float) -> None:
        try:
            await eventually(condition, timeout_s, 0.1)
        except TimeoutError:
            raise AssertionError("\n\n".join(one.child.last_lines() for one in self.servers)) from None


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[MixedSwarm]:
    """Started at the same moment, each with a free choice of two blocks, and equally fast."""
    model = random_llama(tmp_path / "balanced", num_hidden_layers=NUM_BLOCKS)
    node = Node(NodeOptions())
    await node.start()
    try:
        with ExitStack() as running:
            servers = make_servers(model, tmp_path, await node.visible_maddrs())
            for server in servers:
                server.child.start()
                running.callback(server.child.kill)
            yield MixedSwarm(node, model.dht_prefix, servers)
    finally:
        await node.stop()


def make_servers(model: Model, directory: Path, maddrs: list[str]) -> list[Server]:
    ours = {"blocks": {"balance_period_s": PERIOD_S}, "daemon": {"log_level": "debug"}}
    servers = []
    for number in range(3):
        petalsd, stock = directory / f"petalsd{number}", directory / f"stock{number}"
        options = DaemonOptions(model.directory, petalsd, model.dht_prefix, 2, maddrs, others=ours)
        servers.append(Server(daemon_process(options, ForkedDaemon)))
        others = ServerOptions(
            model.petals_directory, stock, model.dht_prefix, 2, maddrs, num_handlers=1,
            balance_period_s=PERIOD_S,
        )  # fmt: skip
        servers.append(Server(server_process(others)))
    return servers


async def test_they_come_to_rest_and_stay(swarm: MixedSwarm) -> None:
    """Every block is served and nobody loads; after twenty more looks of each of them nobody wants to move."""
    placement = await swarm.until_at_rest()
    wishes = swarm.wishes()
    await swarm.until_checked(CHECKS, STAY_S)
    assert swarm.wishes() == wishes
    assert await swarm.placement() == placement
