"""Row 21 of the checklist: who can be dialled."""

from __future__ import annotations

import asyncio

import pytest
from hivemind.p2p import P2PContext, PeerID, ServicerBase
from hivemind.proto import dht_pb2

from petalsd.errors import Overloaded
from petalsd.swarm import reachability
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.p2pd import P2PDaemon, P2PDOptions
from petalsd.swarm.reachability import ReachabilityService, ask, look_around
from tests.swarm.servers import joining, node
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]
NOBODY = PeerID.from_base58("12D3KooWPPYTbCekn58DYPfnN3EpyNH2Y4LAnCUmRmTCwXsU74EX")


class ReachabilityProtocol(ServicerBase):
    """The reference's face, for its stub."""

    async def rpc_check(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse: ...


async def test_row_21_a_server_vouches_for_itself_and_looks_at_others(nodes: tuple[Node, Node]) -> None:
    """About itself it answers at once without a probe; others are dialled; nobody is not reachable."""
    service = ReachabilityService(nodes[0])
    await service.start()
    own, client = nodes[0].p2p.peer_id, nodes[1]
    stub = ReachabilityProtocol.get_stub(client.p2p, own)
    request = dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=own.to_bytes()))
    assert (await stub.rpc_check(request, timeout=10)).available
    assert service._probe is None
    assert await ask(client.p2p, own, NOBODY, 10) is False
    assert service._probe is not None
    async with node(await joining(nodes[0])) as other:
        others = ReachabilityService(other)
        await others.start()
        assert await ask(client.p2p, own, other.p2p.peer_id, 10) is True
        assert await ask(client.p2p, NOBODY, own, 2) is None
        outlook = await look_around(options := await joining(nodes[0]))
        assert outlook.is_dialable
        assert options.initial_peers[0] in outlook.relays[0]
        await others.stop()
    await service.stop()


async def test_whoever_looks_around_leaves_no_probe_behind(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers may ask about others meanwhile, as they ask any server."""
    probes: list[P2PDaemon] = []

    async def asked_meanwhile(looking: Node) -> bool | None:
        assert await ask(nodes[0].p2p, looking.p2p.peer_id, NOBODY, 10) is False
        return True

    class Probe(P2PDaemon):
        def __init__(self, options: P2PDOptions) -> None:
            super().__init__(options)
            probes.append(self)

    monkeypatch.setattr(reachability, "P2PDaemon", Probe)
    monkeypatch.setattr(reachability, "is_reached_by_others", asked_meanwhile)
    assert (await look_around(await joining(nodes[0]))).is_dialable
    assert [probe.is_alive for probe in probes] == [False]


async def test_the_first_question_is_answered_as_the_later_ones_are(nodes: tuple[Node, Node]) -> None:
    """A probe that has just started knows nobody: what it misses then would count as unreachable for a minute."""
    options, client = await joining(nodes[0]), nodes[1].p2p
    async with node(options) as other:
        others = ReachabilityService(other)
        await others.start()
        for _ in range(3):
            async with node(options) as asked:
                service = ReachabilityService(asked)
                await service.start()
                assert await ask(client, asked.p2p.peer_id, other.p2p.peer_id, 10) is True
                await service.stop()
        await others.stop()


async def test_a_probe_that_died_is_made_anew(nodes: tuple[Node, Node]) -> None:
    """Else every peer that others ask about would count as unreachable from then on."""
    options, client = await joining(nodes[0]), nodes[1].p2p
    async with node(options) as asked, node(options) as other:
        service, others = ReachabilityService(asked), ReachabilityService(other)
        await service.start()
        await others.start()

        async def is_reached() -> bool:
            service._results.clear()  # a probe that has just started knows nobody for a moment
            return await ask(client, asked.p2p.peer_id, other.p2p.peer_id, 20) is True

        await eventually(is_reached, timeout_s=20, interval_s=0.2)
        probe = service._probe
        assert probe is not None and probe._child is not None
        probe._child.kill()
        await probe.until_dead()
        await eventually(is_reached, timeout_s=20, interval_s=0.2)
        await others.stop()
        await service.stop()


async def test_questions_are_bounded_and_no_asker_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody could answer in time is refused at once, which counts as no answer."""
    go_on = asyncio.Event()

    async def never_there(*_: object) -> bool:
        await go_on.wait()
        return False

    service = ReachabilityService(Node(NodeOptions()))
    monkeypatch.setattr(reachability, "ask", never_there)
    monkeypatch.setattr(service, "_probe_p2p", never_there)

    def question(number: int, asker: bytes) -> asyncio.Task[dht_pb2.PingResponse]:
        about = dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=b"peer %d" % number))
        context = P2PContext("rpc_check", local_id=PeerID(b"us"), remote_id=PeerID(asker))
        return asyncio.create_task(service.rpc_check(about, context))

    one = [question(number, b"hog") for number in range(20)]
    others = [question(100 + number, b"asker %d" % number) for number in range(50)]
    await asyncio.sleep(0)
    refused = [task for task in (*one, *others) if task.done()]
    assert sum(task in refused for task in one) == 16 and sum(task in refused for task in others) == 38
    assert all(isinstance(task.exception(), Overloaded) for task in refused)
    go_on.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*(task for task in (*one, *others) if task not in refused))
    assert not service._askers


async def test_who_may_relay() -> None:
    """Peers that we are connected to, with all their addresses, the initial ones first; none that is down."""
    initial = ("/ip4/1.2.3.4/tcp/1/p2p/QmA", "/ip6/::2/tcp/1/p2p/QmA", "/ip4/1.2.3.5/tcp/1/p2p/QmDown")
    connected = ["/ip4/1.2.3.6/tcp/9/p2p/QmB", "/ip4/1.2.3.4/tcp/1/p2p/QmA"]
    relays = reachability._relays(initial, connected)
    assert relays == (initial[:2], ("/ip4/1.2.3.6/tcp/9/p2p/QmB",))
    many = [f"/ip4/1.2.3.6/tcp/{port}/p2p/Qm{port}" for port in range(100)]
    assert len(reachability._relays((), many)) == reachability._MAX_RELAYS
