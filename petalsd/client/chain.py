"""One link of a session's chain: the inputs that a span must have seen, and the stream that feeds them to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from petalsd.client.connection import Connector
from petalsd.client.history import InputHistory, PromptHistory, StepLog
from petalsd.client.routing import Hop
from petalsd.client.span_session import SpanSession, StepInput, StreamTerms

_VERSION = re.compile(r"(\d+)\.(\d+)")


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
    ) -> torch.Tensor:
        """Bring the server to the end of the history; returns its outputs from position ``keep_from`` on.

        ``prompts`` and ``steps`` are the session's, up to that end; ``hypo_ids`` how rows have changed places.
        After any failure the stream is dropped, and the next call feeds everything to a new one.
        """
        try:
            stream, start = await self._ready_stream(keep_from, hypo_ids)
            outputs: list[torch.Tensor] = []
            for begin, stop in self._cut(start, prompts, steps):
                hidden = self.history.between(begin, stop)
                slices = prompts.between(begin, stop, self.hop.blocks)
                output = await stream.step(StepInput(hidden, begin, slices, hypo_ids if start else None))
                self._valid, hypo_ids = stop, None
                if stop >= keep_from:
                    outputs.append(output[:, max(keep_from - begin, 0) :])
            return torch.cat(outputs, dim=1)
        except BaseException:
            self._drop()
            raise

    async def close(self) -> None:
        """End the stream, keep the history."""
        stream, self._stream, self._valid = self._stream, None, 0
        if stream is not None:
            await stream.close()

    def _drop(self) -> None:
        stream, self._stream, self._valid = self._stream, None, 0
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
