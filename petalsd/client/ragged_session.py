"""A session of rows of different lengths, the shorter of which begin with padding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch

from petalsd.client.routing import Hop
from petalsd.client.session import InferenceSession
from petalsd.errors import BadRequest


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows that begin with equally much padding, which no server sees: its session begins behind."""

    padding: int
    rows: tuple[int, ...]
    session: InferenceSession

    def skipped(self, position: int, length: int) -> int:
        """How many columns of a step from ``position`` on are padding."""
        return min(max(self.padding - position, 0), length)

    def own_order(self, hypo_ids: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """``hypo_ids`` in numbers of these rows; BadRequest when one of them would go on from another part's."""
        if hypo_ids is None:
            return None
        numbers = {row: number for number, row in enumerate(self.rows)}
        chosen = [hypo_ids[row] for row in self.rows]
        if not numbers.keys() >= set(chosen):
            raise BadRequest(
                "hypo_ids", hypo_ids, "a row goes on from one that begins with equally much padding"
            )
        return tuple(numbers[row] for row in chosen)


class RaggedSession:
    """One ``InferenceSession`` for each length of padding; their steps run at the same time.

    Positions count columns, padding included. A step that fails in one part leaves all where they were.

    make_session  for so many tokens
    padding       tokens of padding that each row begins with
    max_tokens    columns that rows may reach
    """

    def __init__(
        self, make_session: Callable[[int], InferenceSession], padding: tuple[int, ...], max_tokens: int
    ) -> None:
        self.padding = padding
        self.max_tokens = max_tokens
        self._parts = [
            _Part(
                width,
                tuple(row for row, other in enumerate(padding) if other == width),
                make_session(max(max_tokens - width, 1)),
            )
            for width in sorted(set(padding))
        ]
        self._position = 0

    @property
    def position(self) -> int:
        """Columns behind each row. Assigning a smaller value rolls back to it."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        if not 0 <= value <= self._position:
            raise BadRequest("position", value, f"a session rolls back to 0..{self._position}")
        self._position = value
        for part in self._parts:
            part.session.position = max(value - part.padding, 0)

    @property
    def route(self) -> list[Hop]:
        """The servers in use, of one part after the other."""
        return [hop for part in self._parts for hop in part.session.route]

    async def step(self, hidden: torch.Tensor, hypo_ids: tuple[int, ...] | None = None) -> torch.Tensor:
        """As ``InferenceSession.step``; zeros come for padding."""
        if hidden.ndim != 3 or len(hidden) != len(self.padding):
            rule = f"the shape of a step is [{len(self.padding)}, n, M]"
            raise BadRequest("hidden", tuple(hidden.shape), rule)
        orders = [part.own_order(hypo_ids) for part in self._parts]
        steps = [self._step(part, hidden, order) for part, order in zip(self._parts, orders, strict=True)]
        try:
            outcomes = await asyncio.gather(*steps, return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
        except BaseException:
            if hypo_ids is None:
                self._roll_back()
            else:  # rows of some parts have changed places
                await self.close()
            raise
        self._position += hidden.shape[1]
        output = torch.zeros_like(hidden)
        for part, outcome in zip(self._parts, outcomes, strict=True):
            if isinstance(outcome, torch.Tensor):
                output[list(part.rows), -outcome.shape[1] :] = outcome
        return output

    async def close(self) -> None:
        """End the sessions; idempotent."""
        await asyncio.gather(*(part.session.close() for part in self._parts))

    async def _step(
        self, part: _Part, hidden: torch.Tensor, hypo_ids: tuple[int, ...] | None
    ) -> torch.Tensor | None:
        """Of the columns that are no padding; None where all are."""
        skipped = part.skipped(self._position, hidden.shape[1])
        if skipped == hidden.shape[1]:
            return None
        return await part.session.step(hidden[list(part.rows), skipped:], hypo_ids=hypo_ids)

    def _roll_back(self) -> None:
        for part in self._parts:
            part.session.position = min(part.session.position, max(self._position - part.padding, 0))
