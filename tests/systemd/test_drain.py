"""A drain under load: who is here finishes exactly, who comes is refused, who is late is told; the swarm knows."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from petalsd.client.model import RemoteCausalLM
from petalsd.client.runtime import ClientRuntime
from petalsd.errors import PetalsdError, RemoteFailure
from petalsd.swarm.codec import DUMMY, DUMMY_INT64
from petalsd.swarm.directory import read_view
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.protocol import ServerState, make_chain
from petalsd.swarm.stub import ServerStub
from petalsd.types import BlockSpan
from tests.systemd.clients import Generation, connect, greedy
from tests.systemd.conftest import Figure
from tests.systemd.instances import NUM_BLOCKS, Instance
from tests.systemd.lab import Lab
from tests.tiny_models import HIDDEN_SIZE

pytestmark = [pytest.mark.systemd, pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(180)]

NUM_CLIENTS = 4
NUM_TOKENS, HOLD_AT = 24, 8
DEADLINE_S = 3
PROMPTS = [torch.tensor([[5 + i, 9, 17 * i, 3]]) for i in range(NUM_CLIENTS)]
PREFIX = "tiny-hf"


@pytest.fixture
def resumed(demo: Instance, maddr: str) -> Iterator[None]:
    """After the test, if the daemon still runs: it serves again."""
    yield
    if demo.show("ActiveState") == "active":
        demo.ctl("resume")


@pytest.fixture
def pool(resumed: None) -> Iterator[ThreadPoolExecutor]:
    """A thread for each client."""
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        yield pool


@pytest.fixture
def clients(pool: ThreadPoolExecutor, maddr: str, tiny_path: Path) -> Iterator[list[RemoteCausalLM]]:
    """New ones each time: a client avoids a server that failed it for a while."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(one) for one in pool.map(lambda _: connect(tiny_path, maddr), PROMPTS)]


@pytest.fixture(scope="module")
def expected(tiny: PreTrainedModel) -> list[list[int]]:
    """What transformers generates from each client's prompt."""
    return [greedy(tiny, prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.fixture
def generations(pool: ThreadPoolExecutor, clients: list[RemoteCausalLM]) -> Iterator[list[Generation]]:
    """One of each client, all in the middle and held there."""
    running = [
        Generation(pool, client, prompt, NUM_TOKENS, HOLD_AT)
        for client, prompt in zip(clients, PROMPTS, strict=True)
    ]
    for generation in running:
        generation.wait_held()
    yield running
    for generation in running:
        generation.release()


class Onlooker:
    """Another peer of the swarm: reads the directory, and calls the server as any client could."""

    def __init__(self, runtime: ClientRuntime, maddr: str) -> None:
        self._runtime = runtime
        self._node = Node(NodeOptions(initial_peers=(maddr,), client_mode=True))
        self._peer = maddr.rpartition("/")[2]

    def __enter__(self) -> Onlooker:
        self._runtime.run(self._node.start())
        return self

    def __exit__(self, *_: object) -> None:
        self._runtime.run(self._node.stop())

    def state(self) -> ServerState:
        """Of the server's record, the same in all blocks."""
        view = self._runtime.run(read_view(self._node, PREFIX, NUM_BLOCKS))
        (state,) = {records[self._peer].state for records in view.blocks}
        return state

    def until_offline(self) -> float:
        """When it was read."""
        deadline_s = time.monotonic() + 10
        while self.state() is not ServerState.OFFLINE:
            assert time.monotonic() < deadline_s, "the record stays online"
        return time.monotonic()

    def refusal(self) -> str:
        """What the server says to a new session."""
        with pytest.raises(RemoteFailure) as refused:
            self._runtime.run(self._open_session())
        return refused.value.message

    async def _open_session(self) -> None:
        stream = await ServerStub(self._node, self._peer).open_inference()
        try:
            chain = make_chain(PREFIX, BlockSpan(0, NUM_BLOCKS))
            hidden = torch.zeros(1, 1, HIDDEN_SIZE)
            await stream.send(chain, [hidden, DUMMY, DUMMY_INT64], {"max_length": 4, "session_id": "new"})
            await stream.receive()
        finally:
            stream.abort()


@pytest.fixture(scope="module")
def onlooker(maddr: str) -> Iterator[Onlooker]:
    with ClientRuntime() as runtime, Onlooker(runtime, maddr) as onlooker:
        yield onlooker


def drain(lab: Lab, demo: Instance, *words: str) -> subprocess.Popen[str]:
    return lab.spawn(["petalsctl", "-i", demo.name, "drain", "--wait", *words])


def command_pid(process: subprocess.Popen[str]) -> int:
    """Of the command inside, whose parent ``process`` is."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def test_all_who_are_here_finish_and_nobody_comes(
    lab: Lab,
    demo: Instance,
    onlooker: Onlooker,
    generations: list[Generation],
    expected: list[list[int]],
    figure: Figure,
) -> None:
    """OFFLINE within a second, new sessions refused by name, four generations exact, exit 0."""
    assert onlooker.state() is ServerState.ONLINE
    since_s = demo.journal.mark()
    waiting = drain(lab, demo)
    asked = demo.event("drain_started", since_s)
    figure("drain: record read as OFFLINE after", onlooker.until_offline() - asked.monotonic_s)
    assert onlooker.until_offline() - asked.monotonic_s < 1.0
    assert "draining: this server is draining" in onlooker.refusal()
    assert "Draining: 4 sessions left" in demo.show("StatusText")

    for generation in generations:
        generation.release()
    assert [generation.tokens() for generation in generations] == expected
    output, errors = waiting.communicate(timeout=30)
    assert (waiting.returncode, errors) == (0, "")
    assert output.splitlines()[-1] == "drained: no sessions are left"
    drained = demo.event("drained", since_s, abandoned="0")
    figure("drain of 4 generations, first to last", drained.monotonic_s - asked.monotonic_s)
    assert demo.ctl("status", check=False)["state"] == "drained"
    demo.ctl("resume")
    assert onlooker.state() is ServerState.ONLINE


def test_who_is_late_at_the_deadline_is_told(
    lab: Lab, demo: Instance, generations: list[Generation], expected: list[list[int]]
) -> None:
    """Three finish in time; the fourth gets an error that says what happened; the command says how many."""
    since_s = demo.journal.mark()
    waiting = drain(lab, demo, "--deadline", str(DEADLINE_S))
    began = demo.event("drain_started", since_s)
    for generation in generations[:-1]:
        generation.release()
    assert [generation.tokens() for generation in generations[:-1]] == expected[:-1]
    abandoned = demo.event("drain_abandoned", since_s)
    took_s = abandoned.monotonic_s - began.monotonic_s  # as the journal received them
    assert took_s == pytest.approx(DEADLINE_S, abs=0.5)
    generations[-1].release()
    error = generations[-1].error()
    assert isinstance(error, PetalsdError)
    assert "the server's drain reached its deadline" in str(error)
    output, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 0
    assert "1 left at the deadline" in output.splitlines()[-1]


def test_an_interrupted_wait_is_no_resume(
    lab: Lab, demo: Instance, generations: list[Generation], expected: list[list[int]]
) -> None:
    """Ctrl-C ends the command and says that the drain goes on; it does."""
    since_s = demo.journal.mark()
    waiting = drain(lab, demo)
    demo.event("drain_started", since_s)
    assert waiting.stdout is not None
    assert "4 sessions left" in waiting.stdout.readline()
    os.kill(command_pid(waiting), signal.SIGINT)
    _, errors = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert "the drain goes on: 4 sessions left" in errors
    assert demo.ctl("status", check=False)["state"] == "draining"
    for generation in generations:
        generation.release()
    assert [generation.tokens() for generation in generations] == expected
    demo.event("drained", since_s)


def test_a_stop_drains(
    lab: Lab, demo: Instance, generations: list[Generation], expected: list[list[int]], figure: Figure
) -> None:
    """`systemctl stop` waits for the sessions that are here and ends with success."""
    since_s = demo.journal.mark()
    stopping = lab.spawn(["systemctl", "stop", demo.unit])
    demo.event("drain_started", since_s)
    for generation in generations:
        generation.release()
    assert [generation.tokens() for generation in generations] == expected
    _, errors = stopping.communicate(timeout=60)
    assert (stopping.returncode, errors) == (0, "")
    demo.event("drained", since_s, abandoned="0")
    figure("systemctl stop under load", time.monotonic() - since_s)
    assert (demo.show("Result"), demo.show("ExecMainStatus")) == ("success", "0")
