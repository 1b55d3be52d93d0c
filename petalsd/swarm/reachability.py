"""Can other peers dial us? Asking them, and answering the same question for others (protocol.md 3.12)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import structlog
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import dht_pb2

from petalsd.errors import Overloaded, PetalsdError
from petalsd.swarm.node import Node, NodeOptions, peer_of
from petalsd.swarm.p2pd import P2PDaemon, P2PDOptions
from petalsd.swarm.protocol import REACHABILITY_SERVICE, handle_name

log = structlog.get_logger(__name__)

_CHECK = handle_name("rpc_check", REACHABILITY_SERVICE)
_ASK_SELF_TIMEOUT_S = 5.0  # asking a peer about itself
_ASK_OTHER_TIMEOUT_S = 10.0  # asking a peer about a third one
_FIRST_CONTACT_S, _RETRY_S = 3.0, 0.1
_MAX_PROBES = 8
_MAX_CHECKS = 2 * _MAX_PROBES  # under way or waiting: whoever waits longer has given up
_MAX_CHECKS_PER_PEER = 4
_REMEMBERED_S = 60.0
_MAX_REMEMBERED = 4096
_ENOUGH_ANSWERS = 5
_THRESHOLD = 0.5
_MAX_RELAYS = 8


class ReachabilityService:
    """Answers ``rpc_check``. Third peers are dialled from a node of its own, which no peer knows yet."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._probe: P2PDaemon | None = None
        self._starting = asyncio.Lock()
        self._slots = asyncio.Semaphore(_MAX_PROBES)
        self._results: dict[bytes, tuple[bool, float]] = {}
        self._askers: Counter[bytes] = Counter()

    async def start(self) -> None:
        """Answer from now on."""
        await self._node.p2p.add_protobuf_handler(_CHECK, self.rpc_check, dht_pb2.PingRequest)

    async def stop(self) -> None:
        """End the probe; the registration ends with the node."""
        probe, self._probe = self._probe, None
        if probe is not None:
            await probe.stop()

    async def rpc_check(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        """``request.peer.node_id`` holds the PeerID asked about. We are reachable: this request came in.

        Overloaded, which askers count as no answer, while there are too many questions.
        """
        asked = request.peer.node_id
        if asked == context.local_id.to_bytes():
            return dht_pb2.PingResponse(available=True)
        return dht_pb2.PingResponse(available=await self._is_reachable(asked, context.remote_id.to_bytes()))

    async def _is_reachable(self, peer: bytes, asker: bytes) -> bool:
        known = self._results.get(peer)
        if known is not None and known[1] > time.monotonic():
            return known[0]
        if not 0 < len(peer) <= 64:
            return False
        with self._counted(asker):
            async with self._slots:
                answer = await ask(await self._probe_p2p(), PeerID(peer), PeerID(peer), _ASK_SELF_TIMEOUT_S)
        if len(self._results) >= _MAX_REMEMBERED:
            self._results.clear()
        self._results[peer] = (answer is True, time.monotonic() + _REMEMBERED_S)
        return answer is True

    @contextlib.contextmanager
    def _counted(self, asker: bytes) -> Iterator[None]:
        if self._askers.total() >= _MAX_CHECKS:
            raise Overloaded(f"{_MAX_CHECKS} peers are being looked for")
        if self._askers[asker] >= _MAX_CHECKS_PER_PEER:
            raise Overloaded(f"{_MAX_CHECKS_PER_PEER} peers are being looked for at your request")
        self._askers[asker] += 1
        try:
            yield
        finally:
            self._askers[asker] -= 1
            if not self._askers[asker]:
                del self._askers[asker]

    async def _probe_p2p(self) -> P2P:
        """A client that listens nowhere and uses no relay; started at the first need, and anew if it died."""
        async with self._starting:
            if self._probe is not None and not self._probe.is_alive:
                await self._probe.stop()
            if self._probe is None or self._probe.p2p is None:
                maddrs = tuple(await self._node.visible_maddrs())
                self._probe = P2PDaemon(
                    P2PDOptions(
                        initial_peers=self._node.options.initial_peers or maddrs,
                        client_mode=True,
                        listen=False,
                        use_relay=False,
                    )
                )
                await self._until_acquainted(await self._probe.start())
            return self._probe.p2p

    async def _until_acquainted(self, probe: P2P) -> None:
        """It knows nobody at first, and would call everybody unreachable: we, at least, can be reached."""
        own = self._node.p2p.peer_id
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_CONTACT_S):
                while True:
                    if await ask(probe, own, own, _FIRST_CONTACT_S) is not None:
                        return
                    await asyncio.sleep(_RETRY_S)


async def ask(p2p: P2P, through: PeerID, about: PeerID, timeout_s: float) -> bool | None:
    """What ``through`` says about reaching ``about``; None when it does not answer."""
    request = dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=about.to_bytes()))
    try:
        async with asyncio.timeout(timeout_s):
            answer = await p2p.call_protobuf_handler(through, _CHECK, request, dht_pb2.PingResponse)
    except Exception as error:  # not dialable, no such protocol, a failing handler: all mean no answer
        log.debug("reachability_unknown", through=str(through), about=str(about), error=repr(error))
        return None
    return bool(answer.available)


@dataclass(frozen=True, slots=True)
class Outlook:
    """is_dialable  whether peers of the swarm can dial us; None: nobody could be asked
    relays       peers that answered us, and may be reached through: the multiaddrs of each
    """

    is_dialable: bool | None
    relays: tuple[tuple[str, ...], ...] = ()


async def look_around(options: NodeOptions) -> Outlook:
    """How a node with these options would stand in the swarm.

    A node for the question alone is started: a client, listening as ``options`` say, without a relay.
    """
    node = Node(replace(options, client_mode=True, use_relay=False, use_auto_relay=False))
    service = ReachabilityService(node)
    try:
        await node.start()
        await service.start()
        is_dialable = await is_reached_by_others(node)
        return Outlook(is_dialable, _relays(options.initial_peers, await node.connected_maddrs()))
    except PetalsdError as error:
        log.warning("reachability_check_failed", error=str(error))
        return Outlook(None)
    finally:
        try:
            await service.stop()
        finally:
            await node.stop()


def _relays(initial: Sequence[str], connected: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The peers that we are connected to, the initial ones first, each time in another order."""
    addresses: dict[str, list[str]] = {peer_of(maddr): [] for maddr in connected}
    for maddr in (*initial, *connected):
        if (peer := peer_of(maddr)) in addresses:
            addresses[peer].append(maddr)
    first = {peer_of(maddr) for maddr in initial}
    peers = sorted(addresses, key=lambda peer: (peer not in first, random.random()))
    return tuple(tuple(dict.fromkeys(addresses[peer])) for peer in peers[:_MAX_RELAYS])


async def is_reached_by_others(node: Node) -> bool | None:
    """Whether the peers that ``node`` knows can dial it; None when nobody answers."""
    own = node.p2p.peer_id
    answers: list[bool] = []
    for peer in node.known_peers():
        answer = await ask(node.p2p, PeerID.from_base58(peer), own, _ASK_OTHER_TIMEOUT_S)
        if answer is not None:
            answers.append(answer)
        if len(answers) >= _ENOUGH_ANSWERS:
            break
    log.info("reachability_checked", answers=len(answers), reached=sum(answers))
    return sum(answers) / len(answers) >= _THRESHOLD if answers else None
