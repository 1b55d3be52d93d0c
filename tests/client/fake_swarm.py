"""Servers in memory that compute a small stateful function per block, and fail when told to.

Block k: ``y_t = x_t + tanh(W_k · mean(x_0 .. x_t))``. Every output depends on all inputs before it, row by row,
so a wrong replay, rollback or reorder shows in the numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from petalsd.client.routing import Hop
from petalsd.errors import MissingBlocks, RemoteFailure
from petalsd.swarm.directory import RemoteSpan
from petalsd.swarm.protocol import ServerState, parse_span
from petalsd.swarm.record import ServerRecord
from petalsd.swarm.stream import NoAnswer
from petalsd.types import BlockSpan

HIDDEN = 8
PETALSD = "2.3.0+petalsd.test"


def block_weight(block: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + block)
    return torch.randn(HIDDEN, HIDDEN, generator=generator) * 0.5


def run_block(block: int, inputs: torch.Tensor) -> torch.Tensor:
    """``[B, T, M]`` from position 0 -> the same shape."""
    counts = torch.arange(1, inputs.shape[1] + 1).view(1, -1, 1)
    return inputs + torch.tanh((inputs.cumsum(dim=1) / counts) @ block_weight(block))


def run_blocks(span: BlockSpan, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
    """The oracle: all blocks over whole sequences; prompts as in a session's first step."""
    for index, block in enumerate(span):
        if prompts is not None:
            hidden = hidden.clone()
            hidden[:, : prompts.shape[2]] += prompts[index]
        hidden = run_block(block, hidden)
    return hidden


def make_span(peer: str, start: int, end: int, **record: Any) -> RemoteSpan:
    span = BlockSpan(start, end)
    fields = {"version": PETALSD, "span": span, **record}
    return RemoteSpan(peer, span, ServerRecord(ServerState.ONLINE, 10.0, **fields))


@dataclass
class Message:
    """One step as a server saw it."""

    uid: str
    metadata: Mapping[str, Any]
    hidden: torch.Tensor
    prompts: torch.Tensor
    hypo_ids: torch.Tensor


@dataclass
class FakeServer:
    """``before_step`` may raise; it gets the server and the number of the step since its start.

    At step or pass ``hangs_at`` it takes until ``revived``. ``pings``: how often it was pinged. Steps go on
    to other servers of ``swarm``; ``pushed``: the step ids of those that came from others.
    """

    span: RemoteSpan
    before_step: Callable[[FakeServer, int], None] | None = None
    is_alive: bool = True
    hangs_at: int | None = None
    answers_pings: bool = True
    max_step_tokens: int = 1 << 30
    open_streams: int = 0
    messages: list[Message] = field(default_factory=list)
    passes: list[str] = field(default_factory=list)
    pings: int = 0
    swarm: FakeSwarm | None = None
    sessions: dict[str, FakeStream] = field(default_factory=dict)
    pushed: list[str] = field(default_factory=list)
    revived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def peer(self) -> str:
        return self.span.peer

    def check_alive(self) -> None:
        if not self.is_alive:
            raise RemoteFailure(self.peer, "closed the stream")

    async def is_silent(self, timeout_s: float) -> bool:
        self.pings += 1
        return not self.answers_pings

    async def hang(self, number: int) -> None:
        """If it is to, at this step."""
        if number == self.hangs_at:
            await self.revived.wait()

    async def open_inference(self, timeout_s: float) -> FakeStream:
        self.check_alive()
        self.open_streams += 1
        return FakeStream(self)

    async def forward(
        self, uid: str, tensors: Sequence[torch.Tensor], metadata: Mapping[str, object], timeout_s: float
    ) -> list[torch.Tensor]:
        hidden, prompts = tensors
        self.note_pass("forward")
        await self.hang(len(self.passes))
        return [run_blocks(parse_span(uid)[1], hidden, prompts if prompts.numel() else None)]

    async def backward(
        self, uid: str, tensors: Sequence[torch.Tensor], metadata: Mapping[str, object], timeout_s: float
    ) -> list[torch.Tensor]:
        hidden, grad, prompts = tensors
        self.note_pass("backward")
        await self.hang(len(self.passes))
        with torch.enable_grad():
            hidden = hidden.clone().requires_grad_()
            rows = hidden.shape[0]
            prompts = (
                prompts.expand(-1, rows, -1, -1).clone().requires_grad_() if prompts.numel() else prompts
            )
            output = run_blocks(parse_span(uid)[1], hidden, prompts if prompts.numel() else None)
            wanted = [hidden, prompts] if prompts.numel() else [hidden]
            return list(torch.autograd.grad(output, wanted, grad))

    def note_pass(self, name: str) -> None:
        self.passes.append(name)
        if self.before_step is not None:
            self.before_step(self, len(self.passes))
        self.check_alive()


class FakeStream:
    """The server's side of one session, strict about what a real one is strict about."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self._caches: list[torch.Tensor] = []
        self._position = 0
        self._blocks: BlockSpan | None = None
        self._max_length = 0
        self._answers: list[list[torch.Tensor]] = []
        self._is_open = True
        self._step_ids: set[object] = set()

    async def send(self, uid: str, tensors: Sequence[torch.Tensor], metadata: Mapping[str, Any]) -> None:
        server = self.server
        server.messages.append(Message(uid, metadata, *tensors))
        if server.before_step is not None:
            server.before_step(server, len(server.messages))
        server.check_alive()
        if self._blocks is None:
            self._blocks = parse_span(uid)[1]
            self._max_length = metadata["max_length"]
            assert isinstance(self._max_length, int) and isinstance(metadata["session_id"], str)
            self._caches = [tensors[0].new_empty(tensors[0].shape[0], 0, HIDDEN) for _ in self._blocks]
            server.sessions[metadata["session_id"]] = self
        self._take(tensors, metadata)

    def push(self, tensors: Sequence[torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """A step from the server before us."""
        if self.server.is_alive and self._is_open:
            self.server.pushed.append(metadata["step_id"])
            self._take(tensors, metadata)

    def _take(self, tensors: Sequence[torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """What comes a second time is ignored."""
        if metadata["step_id"] in self._step_ids:
            return
        output = self._step(*tensors, start=metadata["start_from_position"])
        self._step_ids.add(metadata["step_id"])
        self._answers.append([output])
        if self.server.swarm is not None and metadata.get("next_servers"):
            (peer, session_id, *_), *rest = metadata["next_servers"]
            onward = {**metadata, "session_id": session_id, "next_servers": rest}
            self.server.swarm(peer).sessions[session_id].push([output, *tensors[1:]], onward)

    @property
    def has_arrived(self) -> bool:
        return bool(self._answers)

    async def receive(self, timeout_s: float) -> list[torch.Tensor]:
        await asyncio.sleep(0)
        self.server.check_alive()
        try:
            async with asyncio.timeout(timeout_s):
                await self.server.hang(len(self.server.messages))
        except TimeoutError:
            raise NoAnswer(self.server.peer, f"no answer within {timeout_s:g} s") from None
        return self._answers.pop(0)

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        self.server.open_streams -= self._is_open
        self._is_open = False

    def _step(
        self, hidden: torch.Tensor, prompts: torch.Tensor, hypo_ids: torch.Tensor, start: Any
    ) -> torch.Tensor:
        assert self._blocks is not None and hypo_ids.dtype == torch.int64
        rows, tokens, _ = hidden.shape
        if rows * tokens > self.server.max_step_tokens:
            raise RemoteFailure(self.server.peer, "Task size greater than max_batch_size (1)")
        if not 0 <= start <= self._position or start + tokens > self._max_length:
            raise RemoteFailure(self.server.peer, f"bad_request: start_from_position = {start}")
        for index, block in enumerate(self._blocks):
            if prompts.numel():
                hidden = hidden.clone()
                hidden[:, : prompts.shape[2]] += prompts[index]
            past = self._caches[index]
            past = (past[hypo_ids] if hypo_ids.numel() else past)[:, :start]
            self._caches[index] = torch.cat([past, hidden], dim=1)
            hidden = run_block(block, self._caches[index])[:, start:]
        self._position = start + tokens
        return hidden


class FakeSwarm:
    """Some servers, and the Router that a session or pass asks. Routing prefers the servers listed first."""

    def __init__(self, *servers: FakeServer) -> None:
        self.servers = {server.peer: server for server in servers}
        self.failures: list[str] = []
        self.refreshes = 0
        self.are_far = False
        self.on_refresh: Callable[[], None] = lambda: None

    def __call__(self, peer: str) -> FakeServer:
        return self.servers[peer]

    def route_session(self, blocks: BlockSpan, max_tokens: int) -> list[Hop]:
        return self.route_pass(blocks)

    def route_pass(self, blocks: BlockSpan) -> list[Hop]:
        usable = [server for server in self.servers.values() if server.peer not in self.failures]
        hops: list[Hop] = []
        block = blocks.start
        while block < blocks.end:
            server = next((server for server in usable if block in server.span.span), None)
            if server is None:
                raise MissingBlocks([block], "tiny")
            stop = min(server.span.span.end, blocks.end)
            hops.append(Hop(server.span, BlockSpan(block, stop)))
            block = stop
        return hops

    async def refresh(self) -> None:
        self.refreshes += 1
        self.on_refresh()

    def is_far(self, peer: str) -> bool:
        return self.are_far

    def report_failure(self, peer: str) -> None:
        self.failures.append(peer)

    def report_success(self, peer: str) -> None:
        if peer in self.failures:
            self.failures.remove(peer)

    @property
    def open_streams(self) -> int:
        return sum(server.open_streams for server in self.servers.values())


def dies_at(step: int) -> Callable[[FakeServer, int], None]:
    """The server is gone when it gets its ``step``-th message."""

    def hook(server: FakeServer, number: int) -> None:
        if number >= step:
            server.is_alive = False

    return hook


def refuses_at(step: int, text: str) -> Callable[[FakeServer, int], None]:
    """The server answers its ``step``-th message with this error."""

    def hook(server: FakeServer, number: int) -> None:
        if number == step:
            raise RemoteFailure(server.peer, text)

    return hook


def refuses_from(step: int, text: str) -> Callable[[FakeServer, int], None]:
    """The server answers its ``step``-th message and all after it with this error."""

    def hook(server: FakeServer, number: int) -> None:
        if number >= step:
            raise RemoteFailure(server.peer, text)

    return hook
