"""A server that others cannot dial joins when a relay has it, and not before; without one it is broken."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from petalsd.daemon import membership
from petalsd.daemon.membership import Membership
from petalsd.daemon.presence import presence_problem
from petalsd.errors import SwarmError
from petalsd.swarm.announcer import AnnouncerOptions
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.reachability import Outlook
from tests.swarm.servers import joining, node

pytestmark = pytest.mark.swarm
RELAY = "/ip4/192.0.2.7/tcp/31337/p2p/QmX/p2p-circuit/p2p/QmY"


@pytest.fixture
async def member(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a swarm that says that it cannot dial this server."""

    async def cannot_be_dialled(options: NodeOptions) -> Outlook:
        return Outlook(is_dialable=False, relays=(options.initial_peers,))

    monkeypatch.setattr(membership, "look_around", cannot_be_dialled)

    async def nothing(self: object) -> None: ...

    monkeypatch.setattr(membership, "_RELAY_S", 0.5)
    monkeypatch.setattr(membership, "TransformerConnectionHandler", Mock())
    monkeypatch.setattr(membership._Connection, "open", nothing)
    monkeypatch.setattr(membership._Connection, "close", lambda self: self.node.stop())
    async with node() as first:
        options = await joining(first, use_auto_relay=True)
        made = Membership(options, AnnouncerOptions("m", 2, None, 60.0), Mock(), Mock())
        yield made
        await made.stop()


async def test_no_relay_is_no_membership(member: Membership, monkeypatch: pytest.MonkeyPatch) -> None:
    async def without(self: Node) -> list[str]:
        return ["/ip4/192.168.7.2/tcp/4001/p2p/QmY"]

    monkeypatch.setattr(Node, "visible_maddrs", without)
    with pytest.raises(
        SwarmError, match="others cannot dial this server, and none of 1 peers took it"
    ) as refused:
        await member.start()
    assert "forward its port" in refused.value.hint
    assert not member.stats().is_member


async def test_a_relay_that_is_lost_breaks_it(member: Membership, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once it may be a moment between two; after a while libp2p will not look again."""
    maddrs = [RELAY]

    async def visible(self: Node) -> list[str]:
        return list(maddrs)

    monkeypatch.setattr(Node, "visible_maddrs", visible)
    await member.start()
    assert member.is_relayed and member.known_maddrs == (RELAY,)
    assert await presence_problem(member) is None
    maddrs.clear()
    assert await presence_problem(member) is None
    monkeypatch.setattr(membership, "_RELAY_LOST_S", -1.0)
    assert "no peer relays for this server any more" in str(await presence_problem(member))


async def test_a_node_is_stopped_also_when_its_handlers_cannot_be() -> None:
    """The process is told to end while a broken member is left: nobody would stop it again."""
    node, handler, announcer = Mock(stop=AsyncMock()), Mock(stop=AsyncMock()), Mock(stop=AsyncMock())
    handler.stop.side_effect = asyncio.CancelledError
    connection = membership._Connection(node, handler, announcer, Mock(), None)
    close = membership._Connection.close
    with pytest.raises(asyncio.CancelledError):
        await close(connection)
    announcer.stop.assert_awaited_once()
    node.stop.assert_awaited_once()
