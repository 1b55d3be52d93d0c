"""Row 16 of the checklist: steps handed from server to server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
import torch

from petalsd.swarm import push
from petalsd.swarm.codec import encode_tensor
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.observer import NullObserver
from petalsd.swarm.protocol import make_chain
from petalsd.swarm.requests import NextServer, StepMessage
from petalsd.types import BlockSpan
from tests.engine.rig import states
from tests.numeric import assert_close
from tests.swarm.servers import PREFIX, Server, joining, node, server
from tests.swarm.stock import DUMMY, DUMMY_INT64, StockSession, stock_request

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
HEAD, TAIL = BlockSpan(0, 2), BlockSpan(2, 4)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chain(
    nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Server, Server]]:
    """Two servers of one model: the first is asked for blocks 0:2, the second for 2:4."""
    path = tmp_path_factory.mktemp("chain")
    async with (
        node(await joining(nodes[0])) as other,
        server(nodes[0], path) as first,
        server(other, path, model=first.model) as second,
    ):
        yield replace(first, span=HEAD), replace(second, span=TAIL)


class Pair:
    """A client's two sessions; the tail's session id is what the head pushes to."""

    def __init__(self, chain: tuple[Server, Server], client: Node) -> None:
        self.servers = chain
        self.client = client
        self.name = str(uuid.uuid4())
        self.head: StockSession
        self.tail: StockSession

    async def open(self, hidden: torch.Tensor) -> torch.Tensor:
        """Prefill both, without pushes."""
        head, tail = self.servers
        self.head, self.tail = await head.stock_session(self.client), await tail.stock_session(self.client)
        middle = await self.head.step(head.uid, hidden, max_length=32, step_id="open")
        return await self.tail.step(tail.uid, middle, max_length=32, step_id="open", session_id=self.name)

    def hop(self, span: BlockSpan = TAIL) -> list[object]:
        return [self.servers[1].node.peer_id, self.name, span.start, span.end]

    async def end(self) -> None:
        assert await self.head.end() and await self.tail.end()


async def test_row_16_a_pushed_step_is_answered_on_the_clients_stream(
    chain: tuple[Server, Server], client: Node
) -> None:
    """The tail answers before the client has sent it anything; the client's own message is then skipped."""
    hidden = states(1, 4)
    pair = Pair(chain, client)
    answers = [await pair.open(hidden[:, :2])]
    middle = await pair.head.step(
        "", hidden[:, 2:3], step_id="s", next_servers=[pair.hop()], start_from_position=2
    )
    answers.append(await pair.tail.answer())
    pair.tail.put("", [middle, DUMMY, DUMMY_INT64], {"step_id": "s"})
    middle = await pair.head.step("", hidden[:, 3:], step_id="t")
    answers.append(await pair.tail.step("", middle, step_id="t"))
    expected = chain[0].model.expected(hidden).detach()
    assert_close(torch.cat(answers, dim=1), expected, **TOLERANCE, what="through a push")
    await pair.end()


async def test_row_16_the_current_steps_tensors_are_pushed(
    chain: tuple[Server, Server], client: Node
) -> None:
    """Beam search survives pushes: hypo_ids of the step go along, not those of the first message."""
    hidden = states(2, 3)
    pair = Pair(chain, client)
    await pair.open(hidden[:, :2])
    beams = torch.tensor([1, 1])
    await pair.head.step("", hidden[:, 2:], hypo_ids=beams, step_id="s", next_servers=[pair.hop()])
    answer = await pair.tail.answer()
    swapped = torch.cat([hidden[beams, :2], hidden[:, 2:]], dim=1)
    assert_close(answer, chain[0].model.expected(swapped).detach()[:, 2:], **TOLERANCE, what="beams")
    await pair.end()


@pytest.mark.parametrize(
    "hop", [["QmNobody", "x", 2, 4], ["12D3KooWPPYTbCekn58DYPfnN3EpyNH2Y4LAnCUmRmTCwXsU74EX", "x", 2, 4]]
)
async def test_row_16_a_push_that_fails_does_not_fail_the_step(
    chain: tuple[Server, Server], client: Node, hop: list[object]
) -> None:
    """A next server that cannot be reached, or is no peer at all, costs the client nothing."""
    pair = Pair(chain, client)
    await pair.open(states(1, 2))
    assert (await pair.head.step("", states(1, 1), step_id="s", next_servers=[hop])).shape == (1, 1, 64)
    await pair.end()


async def test_row_16_a_step_with_prompts_is_not_pushed(chain: tuple[Server, Server], client: Node) -> None:
    """The prompts of a step are cut for one server's blocks, so the next must get its own from the client."""
    pair = Pair(chain, client)
    await pair.open(states(1, 2))
    prompts = torch.zeros(2, 1, 1, 64)
    middle = await pair.head.step("", states(1, 1), prompts, step_id="s", next_servers=[pair.hop()])
    assert not len(chain[0].handler.pusher)
    assert (await pair.tail.step("", middle, step_id="s")).shape == (1, 1, 64)
    await pair.end()


async def test_row_16_an_unknown_session_is_no_error(chain: tuple[Server, Server], client: Node) -> None:
    """A push for a session that has ended, or for other blocks than it has, is dropped without a word."""
    pair = Pair(chain, client)
    await pair.open(states(1, 2))
    middle = await pair.head.step("", states(1, 1), step_id="s", next_servers=[pair.hop(BlockSpan(3, 4))])
    async with asyncio.timeout(10):
        await chain[0].handler.pusher.wait()
    answer = await pair.tail.step("", middle, step_id="s")
    assert answer.shape == (1, 1, 64)
    await pair.end()


async def test_a_peer_that_hangs_holds_up_the_pushes_to_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a share of the places; what is over it is not pushed, and its client sends it."""
    arrived, go_on = [], asyncio.Event()

    class Hanging:
        def __init__(self, _: object, peer: str) -> None:
            self._peer = peer

        async def push(self, *_: object) -> None:
            arrived.append(self._peer)
            await (go_on.wait() if self._peer == "hangs" else asyncio.sleep(0))

    monkeypatch.setattr(push, "ServerStub", Hanging)
    pusher = push.Pusher(Node(NodeOptions()), PREFIX, 5.0, NullObserver())
    output = encode_tensor(states(1, 1))
    for peer in ["hangs"] * 300 + ["lives"]:
        step = StepMessage([], {}, "", None, None, (NextServer(peer, "session", TAIL),))
        pusher.push(step, [], output)
    await asyncio.sleep(0)
    assert arrived.count("hangs") == 64 == len(pusher) - 1 and arrived[-1] == "lives"
    go_on.set()
    await pusher.wait()
    assert not len(pusher) and not pusher._per_peer


async def test_a_bad_push_leaves_the_session_to_its_client(
    chain: tuple[Server, Server], client: Node
) -> None:
    """A pushed step that does not fit is dropped; the client's own message for the step still counts."""
    hidden = states(1, 3)
    pair = Pair(chain, client)
    first = await pair.open(hidden[:, :2])
    bad = [states(5, 1), DUMMY, DUMMY_INT64]
    metadata = {"session_id": pair.name, "step_id": "s", "pushed": True}
    await _push(chain[1], client, bad, metadata)
    middle = await pair.head.step("", hidden[:, 2:], step_id="s")
    second = await pair.tail.step("", middle, step_id="s")
    expected = chain[0].model.expected(hidden).detach()
    assert_close(torch.cat([first, second], dim=1), expected, **TOLERANCE, what="after a bad push")
    await pair.end()


async def _push(to: Server, client: Node, tensors: list[torch.Tensor], metadata: dict[str, object]) -> None:
    await to.stock(client).rpc_push(stock_request(make_chain(PREFIX, to.span), tensors, metadata), timeout=10)
