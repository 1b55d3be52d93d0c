"""One stream of a session: what its server has been told, and the form of each message (protocol.md 3.9)."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import torch

from petalsd.client.connection import Connection, Connector, StepStream
from petalsd.client.options import ClientOptions
from petalsd.client.relay import Relay
from petalsd.client.routing import Hop
from petalsd.client.silence import while_heard
from petalsd.errors import RemoteFailure
from petalsd.swarm.codec import DUMMY, DUMMY_INT64, packed_structure
from petalsd.swarm.protocol import make_chain
from petalsd.swarm.stream import NoAnswer

log = structlog.get_logger(__name__)

_CLOSE_TIMEOUT_S = 3.0
_SOON_S = 1.0  # most answers come in this time, and are waited for without a task of their own
_ARGUMENTS = packed_structure(3)


@dataclass(frozen=True, slots=True)
class StreamTerms:
    """What all streams of a session agree on.

    prefix      the model's
    max_tokens  positions that a row may reach
    whole_from  steps beyond it may not be cut (see ``history.StepLog``); None: all may
    """

    prefix: str
    max_tokens: int
    options: ClientOptions
    whole_from: int | None = None


@dataclass(frozen=True, slots=True)
class StepInput:
    """One message: ``hidden`` ``[B, n, M]`` for positions from ``start``; the rest as in ``engine.step.Step``.

    relay        of a message that is all of a step
    is_expected  the server may have got the step from the one before it
    """

    hidden: torch.Tensor
    start: int
    prompts: torch.Tensor | None = None
    hypo_ids: tuple[int, ...] | None = None
    relay: Relay | None = None
    is_expected: bool = False


@dataclass(frozen=True, slots=True)
class Handed:
    """A session that waits at a server for whoever shows the ``ticket``, with ``position`` tokens in its cache."""

    ticket: str
    position: int


class SpanSession:
    """An ``rpc_inference`` stream to one server. After any failure it is closed and good for nothing.

    ``position`` is what the server's cache holds.
    """

    def __init__(
        self,
        hop: Hop,
        server: Connection,
        stream: StepStream,
        terms: StreamTerms,
        handed: Handed | None = None,
    ) -> None:
        self.hop = hop
        self._server = server
        self.position = 0 if handed is None else handed.position
        self._handed = handed
        self._stream = stream
        self._terms = terms
        self.session_id = str(uuid.uuid4())
        self._is_first = True
        self._num_sent = 0
        self._opened_s = self._used_s = time.monotonic()

    @classmethod
    async def open(
        cls, hop: Hop, connector: Connector, terms: StreamTerms, handed: Handed | None = None
    ) -> SpanSession:
        """Dial the server. Nothing is reserved there before the first step; that claims a ``handed`` session."""
        server = connector(hop.peer)
        stream = await server.open_inference(terms.options.connect_timeout_s)
        return cls(hop, server, stream, terms, handed)

    @property
    def is_open(self) -> bool:
        """Whether the server has answered a step of it."""
        return not self._is_first

    @property
    def is_worn(self) -> bool:
        """Whether the server may have closed the stream for its age or idleness, or will soon."""
        options, now = self._terms.options, time.monotonic()
        return now - self._used_s > options.max_idle_s or now - self._opened_s > options.max_stream_age_s

    async def step(self, step: StepInput) -> torch.Tensor:
        """Send one step, unless its answer is here, and wait for that: same shape.

        RemoteFailure or DeadlineExceeded.
        """
        uid, timeout_s = "", self._terms.options.request_timeout_s
        if self._is_first:
            uid = make_chain(self._terms.prefix, self.hop.blocks)
            timeout_s += self._terms.options.alloc_timeout_s
        self._num_sent += 1
        if not (step.is_expected and self._stream.has_arrived):
            await self._stream.send(uid, _tensors(step), self._metadata(step))
        self._is_first = False
        (output,) = _expect_one(self.hop.peer, await self._answer(timeout_s))
        if output.shape != step.hidden.shape:
            raise RemoteFailure(
                self.hop.peer, f"answered shape {tuple(output.shape)} to a step of {tuple(step.hidden.shape)}"
            )
        self.position = step.start + step.hidden.shape[1]
        self._used_s = time.monotonic()
        return output

    async def _answer(self, timeout_s: float) -> list[torch.Tensor]:
        try:
            return await self._stream.receive(min(_SOON_S, timeout_s))
        except NoAnswer:
            if timeout_s <= _SOON_S:
                raise
        waiting_on = self._stream.receive(timeout_s - _SOON_S)
        return await while_heard(waiting_on, self._server, self._terms.options, self._note_late)

    def _note_late(self) -> None:
        """Somebody may be looking at a text that does not go on, for minutes if nobody else answers either."""
        waited_s = _SOON_S + self._terms.options.silence_s
        log.warning("answer_late", peer=self.hop.peer, blocks=str(self.hop.blocks), waited_s=waited_s)

    async def close(self) -> None:
        """End the session on the server; bounded, never raises."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._stream.close()
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        """Drop a stream that failed."""
        self._stream.abort()

    def _metadata(self, step: StepInput) -> dict[str, object]:
        relay = step.relay
        metadata: dict[str, object] = {
            "session_id": self.session_id,
            "step_id": f"{self.session_id}-{self._num_sent}" if relay is None else relay.step_id,
            "start_from_position": step.start,
            "args_structure": _ARGUMENTS,
        }
        if relay is not None and relay.seats:
            metadata["next_servers"] = relay.seats
        if self._is_first:
            metadata |= {
                "max_length": self._terms.max_tokens,
                "points": 0.0,
                "active_adapter": self._terms.options.adapter or "",
                "alloc_timeout": self._terms.options.alloc_timeout_s,
                "can_follow": True,
            }
        if self._is_first and self._handed is not None:
            metadata["session_ticket"] = self._handed.ticket
        return metadata


def _tensors(step: StepInput) -> list[torch.Tensor]:
    hypo_ids = DUMMY_INT64 if step.hypo_ids is None else torch.tensor(step.hypo_ids, dtype=torch.int64)
    return [step.hidden, DUMMY if step.prompts is None else step.prompts, hypo_ids]


def _expect_one(peer: str, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    if len(tensors) != 1:
        raise RemoteFailure(peer, f"answered {len(tensors)} tensors to a step instead of 1")
    return tensors
