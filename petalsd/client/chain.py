"""One link of a session's chain: the inputs that a span must have seen, and the stream that feeds them to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import structlog
import torch

from petalsd.client.connection import Connector
from petalsd.client.history import InputHistory, PromptHistory, StepLog
from petalsd.client.relay import Relay, Seat
from petalsd.client.retry import REMOTE_ERRORS
from petalsd.client.routing import Hop
from petalsd.client.span_session import Handed, SpanSession, StepInput, StreamTerms
from petalsd.errors import SessionMoved
from petalsd.swarm.stream import RemoteError

log = structlog.get_logger(__name__)

_MAX_FOLLOWED = 3
_VERSION = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class _Redirect:
    """``position`` is what the server's cache held, ``valid`` how much of that the history shares."""

    moved: SessionMoved
    position: int
    valid: int


class ChainLink:
    """A span of the chain. Its history says what the server should hold; the stream what it does hold.

    Feeding closes the gap between them, so decoding, prefill, rollback and recovery are one operation.
    """

    def __init__(self, hop: Hop, connector: Connector, terms: StreamTerms) -> None:
        self.hop = hop
        self.history = InputHistory()
        self._connector = connector
        self._terms = terms
        self._stream: SpanSession | None = None
        self._valid = 0  # positions that the stream shares with the history
        self._is_expected = False  # an answer may come unasked, for the server before hands the step on
        self._redirect: _Redirect | None = None
        self._left: list[str] = []  # servers that have handed the session on since the last answer

    @property
    def peer(self) -> str:
        return self.hop.peer

    @property
    def relays(self) -> bool:
        """Whether the server hands on what it computed: stock ones do so with tensors of another step."""
        return is_petalsd(self.hop.server.record.version)

    def seat(self, position: int) -> Seat | None:
        """Where the server may be handed a step from ``position`` on; None where its cache does not end there."""
        stream = self._stream
        if stream is None or not stream.is_open or stream.is_worn or not self.relays:
            return None
        if not self._valid == stream.position == position:
            return None
        return self.hop.peer, stream.session_id, self.hop.blocks.start, self.hop.blocks.end

    def expect(self) -> None:
        """The next step may be answered before it is fed. It must be fed, or else ``forget`` it."""
        self._is_expected = True

    def forget(self) -> None:
        """The expected step is not fed: no stream may be left where its answer would be taken for another's."""
        if self._is_expected:
            self._drop()

    @property
    def suspects(self) -> list[str]:
        """Who is to blame for a failure: the server, and those whose hand-over led there."""
        return [self.hop.peer, *self._left]

    def rewind(self, position: int) -> None:
        """What comes after ``position`` was rolled back; the server hears of it with the next step."""
        self.history.truncate(position)
        self._valid = min(self._valid, position)

    def reorder(self, hypo_ids: Sequence[int]) -> None:
        """Rows of the history change places; the server's cache follows in ``feed(..., hypo_ids)``."""
        self.history.reorder(hypo_ids)

    async def feed(
        self,
        prompts: PromptHistory,
        steps: StepLog,
        keep_from: int,
        hypo_ids: tuple[int, ...] | None = None,
        relay: Relay | None = None,
    ) -> torch.Tensor:
        """Bring the server to the end of the history; returns its outputs from position ``keep_from`` on.

        ``prompts`` and ``steps`` are the session's, up to that end; ``hypo_ids`` how rows have changed places;
        ``relay`` is the last step's, for the message that is all of it.
        After any failure the stream is dropped, and the next call feeds everything to a new one, unless ``follow``
        comes first.
        """
        stream, moves_rows = self._stream, hypo_ids is not None
        try:
            stream, start = await self._ready_stream(keep_from, hypo_ids)
            outputs: list[torch.Tensor] = []
            for begin, stop in self._cut(start, prompts, steps):
                hidden = self.history.between(begin, stop)
                slices = prompts.between(begin, stop, self.hop.blocks)
                told = relay if relay is not None and begin == relay.position else None
                rows = hypo_ids if start else None
                step = StepInput(hidden, begin, slices, rows, told, self._is_expected)
                output = await stream.step(step)
                self._valid, hypo_ids, self._left, self._is_expected = stop, None, [], False
                if stop >= keep_from:
                    outputs.append(output[:, keep_from - begin :] if begin < keep_from else output)
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        except BaseException as error:
            # Rows that have changed places already must not do so again.
            if isinstance(error, RemoteError) and stream is not None and moves_rows == (hypo_ids is not None):
                self._note_redirect(error, stream)
            self._drop()
            raise

    async def follow(self) -> bool:
        """Go on where the server has handed the session that it ended; False when that is not possible.

        The next ``feed`` finds there what it had here.
        """
        redirect, self._redirect = self._redirect, None
        if redirect is None or len(self._left) >= _MAX_FOLLOWED:
            return False
        hop = replace(self.hop, server=replace(self.hop.server, peer=redirect.moved.peer))
        handed = Handed(redirect.moved.ticket, redirect.position)
        try:
            self._stream = await SpanSession.open(hop, self._connector, self._terms, handed)
        except REMOTE_ERRORS as error:
            log.info("redirect_failed", peer=hop.peer, error=str(error))
            return False
        log.info("redirect_followed", old=self.hop.peer, new=hop.peer, blocks=str(hop.blocks))
        self._left.append(self.hop.peer)
        self.hop, self._valid = hop, redirect.valid
        return True

    def _note_redirect(self, error: RemoteError, stream: SpanSession) -> None:
        if error.moved is not None and self._terms.options.allows(error.moved.peer):
            self._redirect = _Redirect(error.moved, stream.position, self._valid)

    async def close(self) -> None:
        """End the stream, keep the history."""
        stream, self._stream, self._valid, self._is_expected = self._stream, None, 0, False
        if stream is not None:
            await stream.close()

    def _drop(self) -> None:
        stream, self._stream, self._valid, self._is_expected = self._stream, None, 0, False
        if stream is not None:
            stream.abort()

    async def _ready_stream(
        self, keep_from: int, hypo_ids: tuple[int, ...] | None
    ) -> tuple[SpanSession, int]:
        """The stream to use and the first position to send."""
        stream, start = self._stream, min(self._valid, keep_from)
        if stream is not None:
            rolls_back = start < stream.position and not can_roll_back(self.hop.server.record.version)
            reorders = hypo_ids is not None and not can_reorder(self.hop.server.record.version)
            if not (rolls_back or reorders or stream.is_worn):
                return stream, start
            await self.close()
        self._stream = await SpanSession.open(self.hop, self._connector, self._terms)
        return self._stream, 0

    def _cut(self, start: int, prompts: PromptHistory, steps: StepLog) -> Iterator[tuple[int, int]]:
        rows = max(self.history.num_rows, 1)
        max_tokens = max(self._terms.options.max_step_tokens // rows, 1)
        return steps.cut(start, self.history.length, max_tokens, prompts.starts())


def can_roll_back(version: str | None) -> bool:
    """Whether a server honours ``start_from_position``: stock Petals before 2.3 ignores it silently."""
    return is_petalsd(version) or _version(version) >= (2, 3)


def can_reorder(version: str | None) -> bool:
    """Whether a server honours ``hypo_ids`` in mid-session: stock Petals 2.3 fails on them."""
    return is_petalsd(version) or (0, 0) < _version(version) < (2, 3)


def is_petalsd(version: str | None) -> bool:
    return version is not None and "petalsd" in version


def _version(text: str | None) -> tuple[int, int]:
    """``"2.3.0.dev2"`` -> ``(2, 3)``; (0, 0) for what nobody can read."""
    match = _VERSION.match(text or "")
    return (int(match[1]), int(match[2])) if match else (0, 0)
