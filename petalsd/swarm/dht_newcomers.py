"""Nodes of the DHT that are new to us, bounded in number, time and bytes.

For each id that is not in the routing table hivemind looks through all that is stored, to send the newcomer what
it should keep, in one message however much that is. Ids cost nothing: fifty pings of one peer, each with another
one, held up the loop for 15 s where 8,000 keys were stored.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID

from petalsd.swarm.protocol import MAX_UNARY_BYTES

_TIME_SHARE = 0.1  # of the loop's time
_ENTRY_BYTES = 64  # what an entry takes beside its value and name
_MAX_SENT_BYTES = MAX_UNARY_BYTES // 2

Update = Callable[..., Awaitable[None]]
Store = Callable[..., Awaitable[list[bool] | None]]


def bound_newcomers(node: DHTNode, clock: Callable[[], float] = time.monotonic) -> None:
    """For a node that has just joined."""
    protocol = node.protocol
    protocol.update_routing_table = _Admission(protocol, protocol.update_routing_table, clock).update
    protocol.call_store = _fitting(protocol.call_store)


class _Admission:
    """One id for each peer, one peer for each id; and no new ones for a while after one that took long.

    They come again.
    """

    def __init__(self, protocol: Any, update: Update, clock: Callable[[], float]) -> None:
        self._protocol = protocol
        self._update = update
        self._clock = clock
        self._resume_s = 0.0

    async def update(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        """In the place of hivemind's method of the protocol."""
        table = self._protocol.routing_table
        if not responded or node_id is None:
            return await self._update(node_id, peer_id, responded=responded)
        if node_id in table:
            if table.get(node_id=node_id) == peer_id:  # else it is another one's, as long as that answers
                await self._update(node_id, peer_id, responded=responded)
            return
        began_s = self._clock()
        if began_s < self._resume_s:
            return
        former = table.get(peer_id=peer_id)
        if former is not None:  # it has started anew, or says so
            with contextlib.suppress(KeyError):
                del table[former]
        await self._update(node_id, peer_id, responded=responded)
        now_s = self._clock()
        self._resume_s = now_s + (now_s - began_s) / _TIME_SHARE


def _fitting(store: Store) -> Store:
    async def call_store(
        peer: PeerID, keys: Sequence[DHTID], values: Sequence[Any], *args: Any, **kwargs: Any
    ) -> list[bool] | None:
        """In the place of hivemind's, which would pack all of it and then not send it."""
        count = _num_fitting(values)
        if count == len(values):
            return await store(peer, keys, values, *args, **kwargs)
        fitting = [_first(arg, count) for arg in args]
        named = {name: _first(arg, count) for name, arg in kwargs.items()}
        stored = await store(peer, keys[:count], values[:count], *fitting, **named) if count else []
        return None if stored is None else [*stored, *[False] * (len(values) - count)]

    return call_store


def _first(values: Any, count: int) -> Any:
    """Of what is said for each key; the rest is said of all."""
    return values[:count] if isinstance(values, list | tuple) else values


def _num_fitting(values: Sequence[Any]) -> int:
    """How many of the first values fit into one message."""
    num_bytes = 0
    for count, value in enumerate(values):
        entries = value.data.items() if isinstance(value, DictionaryDHTValue) else [("", value)]
        for subkey, item in entries:
            packed = item if isinstance(item, bytes) else item.value
            num_bytes += len(packed) + len(str(subkey)) + _ENTRY_BYTES
            if num_bytes > _MAX_SENT_BYTES:
                return count
    return len(values)
