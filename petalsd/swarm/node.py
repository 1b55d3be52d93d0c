"""Our place in the swarm: one libp2p daemon, one DHT node in this loop, one PeerID for both."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from petalsd.errors import DeadlineExceeded, SwarmError
from petalsd.swarm.dht_guard import DHTGuard, guard_answers, guard_unpacking
from petalsd.swarm.dht_newcomers import bound_newcomers
from petalsd.swarm.dht_requests import bound_requests
from petalsd.swarm.dht_storage import bound_storage
from petalsd.swarm.identity import IdentityLock, ensure_identity
from petalsd.swarm.inbound_budget import InboundBudget
from petalsd.swarm.p2pd import P2PDaemon, P2PDOptions
from petalsd.swarm.protocol import MIB

log = structlog.get_logger(__name__)

_PING_TIMEOUT_S = 5.0
_STOP_DHT_S = 2.0
_ASKED_PEERS = 8
RELAYED = "/p2p-circuit"  # in a multiaddr that leads through another peer
_P2P_PROTOCOL = b"\xa5\x03"  # 421, the multiaddr protocol of PeerIDs, as a varint


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How to join.

    initial_peers       multiaddrs with ``/p2p/<PeerID>``; empty starts a swarm of our own
    client_mode         dial only: not in anybody's routing table, serves no part of the DHT
    is_dialable, relays  as in ``P2PDOptions``
    num_workers         lookups in flight at once; stock servers use the number of the model's blocks
    max_message_bytes   the largest message of a stream; a prefill is one message
    max_inbound_bytes   what large messages may hold together until they are dealt with; those of one peer: half
    """

    initial_peers: tuple[str, ...] = ()
    host_maddrs: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    identity_path: Path | None = None
    client_mode: bool = False
    use_relay: bool = True
    use_auto_relay: bool = False
    is_dialable: bool | None = None
    relays: tuple[str, ...] = ()
    num_workers: int = 32
    startup_timeout_s: float = 60.0
    dht_timeout_s: float = 3.0
    max_message_bytes: int = 1024 * MIB
    max_inbound_bytes: int = 4096 * MIB

    def p2pd_options(self) -> P2PDOptions:
        return P2PDOptions(
            initial_peers=self.initial_peers,
            host_maddrs=self.host_maddrs,
            announce_maddrs=self.announce_maddrs,
            identity_path=self.identity_path,
            client_mode=self.client_mode,
            use_relay=self.use_relay,
            use_auto_relay=self.use_auto_relay,
            is_dialable=self.is_dialable,
            relays=self.relays,
            startup_timeout_s=self.startup_timeout_s,
        )


class DHTEntry(NamedTuple):
    """What one writer stored; ``expiration`` in Unix seconds. Anyone may have written anything."""

    value: object
    expiration: float


class Node:
    """Start it, use it, stop it; everything runs in the loop that started it."""

    def __init__(self, options: NodeOptions) -> None:
        self.options = options
        self.budget = InboundBudget(options.max_message_bytes, options.max_inbound_bytes)
        self._daemon = P2PDaemon(options.p2pd_options())
        self._lock: IdentityLock | None = None
        self._p2p: P2P | None = None
        self._dht: DHTNode | None = None

    async def start(self) -> None:
        """Join the swarm; SwarmError says why it cannot, ConfigError that the key is damaged."""
        quiet_hivemind()
        try:
            if self.options.identity_path is not None:
                await asyncio.to_thread(ensure_identity, self.options.identity_path)  # it may have to wait
                self._lock = IdentityLock(self.options.identity_path)
                self._lock.acquire()
            self._p2p = await self._daemon.start()
            self._dht = await self._join(self._p2p)
        except BaseException:
            await self.stop()
            raise
        log.info("node_started", peer_id=self.peer_id, client_mode=self.options.client_mode)

    async def stop(self, deadline_s: float = _STOP_DHT_S) -> None:
        """Leave the swarm and end the daemon, which a cancellation does not spare; idempotent."""
        dht, self._dht = self._dht, None
        try:
            # The tasks of the DHT end in any case, but only a daemon that lives answers the farewell.
            if dht is not None:
                async with asyncio.timeout(deadline_s if self._daemon.is_alive else 0.0):
                    await dht.shutdown()
        except Exception as error:  # a daemon that died first must not keep us from ending the rest
            log.debug("dht_shutdown_failed", error=repr(error))
        finally:
            self._p2p = None
            await self._daemon.stop()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    async def until_failed(self) -> str:
        """Wait until the node is broken for good (the daemon died, ...); the reason. Stop and start anew then."""
        return await self._daemon.until_dead()

    @property
    def p2p(self) -> P2P:
        """For calls. SwarmError when nobody would ever answer them."""
        if self._p2p is None:
            raise SwarmError("the node is not started")
        if not self._daemon.is_alive:
            raise SwarmError("the libp2p daemon is gone")
        return self._p2p

    @property
    def dht(self) -> DHTNode:
        if self._dht is None:
            raise SwarmError("the node is not started")
        return self._dht

    @property
    def peer_id(self) -> str:
        """Our base58 PeerID."""
        if self._p2p is None:
            raise SwarmError("the node is not started")
        return str(self._p2p.peer_id.to_base58())

    async def visible_maddrs(self) -> list[str]:
        """Addresses with ``/p2p/<PeerID>`` under which others may dial us; empty when there are none (yet).

        SwarmError when the libp2p daemon cannot be asked: it died.
        """
        try:
            return [str(maddr) for maddr in await self.p2p.get_visible_maddrs(latest=True)]
        except ValueError:
            return []
        except (OSError, EOFError, P2PDaemonError) as error:
            raise SwarmError(f"the libp2p daemon cannot be asked: {error or type(error).__name__}") from error

    async def connected_maddrs(self) -> list[str]:
        """Addresses with ``/p2p/<PeerID>`` of the peers that we are connected to, no relays between."""
        try:
            peers = await self.p2p.list_peers()
        except (OSError, EOFError, P2PDaemonError) as error:
            raise SwarmError(f"the libp2p daemon cannot be asked: {error or type(error).__name__}") from error
        maddrs = [(str(maddr), peer.peer_id) for peer in peers for maddr in peer.addrs]
        return [f"{maddr}/p2p/{peer}" for maddr, peer in maddrs if RELAYED not in maddr]

    def known_peers(self) -> list[str]:
        """Peers in our DHT routing table."""
        return [peer.to_base58() for peer in self.dht.protocol.routing_table.peer_id_to_uid]

    @property
    def num_stored_keys(self) -> int:
        """Of the directory, that this node keeps for everybody."""
        return len(self.dht.protocol.storage)

    async def store(
        self, keys: Sequence[str], subkey: str, value: object, expiration: float, timeout_s: float
    ) -> list[str]:
        """Write one value under ``subkey`` of all keys until ``expiration`` (Unix seconds); the refused keys.

        A key is refused when no node answered or one holds an entry that expires later.
        """
        work = self.dht.store_many(
            list(keys),
            [value] * len(keys),
            float(expiration),
            subkeys=[subkey] * len(keys),
            num_workers=self.options.num_workers,
        )
        done = await self._within(timeout_s, work, "storing")
        return [key for key in keys if not done[key, subkey]]

    async def get(self, keys: Sequence[str], timeout_s: float) -> dict[str, dict[object, DHTEntry]]:
        """The latest unexpired subkey -> entry of each key; a key that holds no such map reads as empty."""
        if not keys:
            return {}
        work = self.dht.get_many(
            list(keys), sufficient_expiration_time=math.inf, num_workers=self.options.num_workers
        )
        found = await self._within(timeout_s, work, "reading")
        return {key: _live_entries(found.get(key)) for key in keys}

    async def ping(self, peer: str, timeout_s: float = _PING_TIMEOUT_S) -> float:
        """Round trip in seconds, ``inf`` for no answer; a dial-only peer shows by its refusal that it lives."""
        protocol = self.dht.protocol
        started = time.perf_counter()
        try:
            stub = protocol.get_stub(PeerID.from_base58(peer))
            async with asyncio.timeout(timeout_s):
                await stub.rpc_ping(dht_pb2.PingRequest(peer=protocol.node_info))
        except Exception as error:  # no address, no route, no protocol: hivemind raises many kinds
            if "not supported" not in str(error):
                return math.inf
        return time.perf_counter() - started

    async def is_in_touch(self) -> bool:
        """Whether any peer answers. The initial ones are dialled again; a swarm of our own has nobody to lose."""
        if not self.options.initial_peers:
            return True
        known = random.sample(peers := self.known_peers(), min(len(peers), _ASKED_PEERS))
        if any(math.isfinite(rtt_s) for rtt_s in await asyncio.gather(*map(self.ping, known))):
            return True
        return await self._redial_all()

    async def acquaint(self, maddrs: Sequence[str]) -> int:
        """Dial those of the peers at ``maddrs`` that our routing table lacks; how many of all are in it then.

        Whoever is new there is asked for others near us, as in a start through it.
        """
        before = set(self.known_peers())
        peers = {peer_of(maddr) for maddr in maddrs}
        await asyncio.gather(*(self._redial(maddr) for maddr in maddrs if peer_of(maddr) not in before))
        found = peers & set(self.known_peers())
        if found - before:
            await self.dht.find_nearest_nodes([self.dht.node_id])
        return len(found)

    async def _redial_all(self) -> bool:
        """Whether any of the initial peers answers."""
        return any(await asyncio.gather(*map(self._redial, self.options.initial_peers)))

    async def _redial(self, maddr: str) -> bool:
        """Whether the peer answers; then it is in our routing table, too."""
        protocol, peer = self.dht.protocol, peer_of(maddr)
        try:
            peer_id = PeerID.from_base58(peer)
            async with asyncio.timeout(_PING_TIMEOUT_S):
                await self.p2p._client.connect(peer_id, [dialable(maddr)])
                node_id = await protocol.call_ping(peer_id)
        except Exception as error:  # no route, refused, no such peer: the daemon's answer is text
            log.debug("redial_failed", peer=peer, error=repr(error))
            return False
        if node_id is None:
            return False
        await protocol.update_routing_table(node_id, peer_id)
        return True

    async def _find_back(self) -> None:
        """hivemind forgets whoever leaves one request unanswered. A client that knows nobody any more would read
        nothing for ever: nobody turns to it.
        """
        if self.options.initial_peers and not self.known_peers() and await self._redial_all():
            log.info("swarm_found_back")

    async def _join(self, p2p: P2P) -> DHTNode:
        peers = list(self.options.initial_peers)
        guard_unpacking()
        try:
            async with asyncio.timeout(self.options.startup_timeout_s):
                dht = await DHTNode.create(
                    p2p=p2p,
                    initial_peers=peers,
                    client_mode=self.options.client_mode,
                    num_workers=self.options.num_workers,
                    wait_timeout=self.options.dht_timeout_s,
                    record_validator=DHTGuard(),
                )
                bound_storage(dht)
                guard_answers(dht)
                bound_requests(dht, p2p)
                bound_newcomers(dht)
                return dht
        except Exception as error:  # RuntimeError, ValidationError, bad multiaddrs: all about these peers
            raise SwarmError(
                f"cannot join the swarm through {', '.join(peers)}: {error or type(error).__name__}",
                hint="check that the initial peers run, that their addresses are right and the clock too",
            ) from error

    async def _within(self, timeout_s: float, work: Coroutine[Any, Any, Any], what: str) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                await self._find_back()
                return await work
        except TimeoutError:
            raise DeadlineExceeded(f"{what} in the DHT took longer than {timeout_s:g} s") from None
        finally:
            work.close()  # where it has not begun


def peer_of(maddr: str) -> str:
    """The base58 PeerID at the end of a multiaddr; a relay's own stands further in front."""
    return maddr.rpartition("/p2p/")[2]


def dialable(maddr: str) -> Multiaddr:
    """``maddr`` without the peer at its end, for libp2p to dial it; relays that it leads through are kept.

    hivemind packs PeerIDs in addresses as CIDs; libp2p reads plain multihashes there.
    """
    first, *relays = maddr.split("/p2p/")[:-1] if "/p2p/" in maddr else [maddr]
    packed = Multiaddr(first).to_bytes()
    for relay in relays:
        peer, slash, rest = relay.partition("/")
        multihash = PeerID.from_base58(peer).to_bytes()
        packed += _P2P_PROTOCOL + bytes([len(multihash)]) + multihash
        packed += Multiaddr(slash + rest).to_bytes() if rest else b""
    return Multiaddr(packed)


def quiet_hivemind() -> None:
    """Route hivemind's log through the root logger, without its own handler and colours."""
    use_hivemind_log_handler("nowhere")
    logger = logging.getLogger("hivemind")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)


def _live_entries(found: object) -> dict[object, DHTEntry]:
    """hivemind's answer for one key -> the entries that have not expired by our clock."""
    values = getattr(found, "value", None)
    if not isinstance(values, dict):
        return {}
    entries = {
        subkey: DHTEntry(timed.value, timed.expiration_time)
        for subkey, timed in values.items()
        if hasattr(timed, "expiration_time")
    }
    now = time.time()
    return {subkey: entry for subkey, entry in entries.items() if entry.expiration > now}
