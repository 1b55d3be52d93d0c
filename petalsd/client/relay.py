"""Steps that pass from server to server: each hands its output to the next one, beside its answer to us.

    without   we ─ A ─ we ─ B ─ we ─ C ─ we      six ways for three servers
    with      we ─ A ─ B ─ C ─ we                 four

We still send every server its step, unless its answer came first, and what comes second is ignored there: a step
that is lost between two servers costs nothing but time. Servers that answer pings at once get their steps from us
alone, for a relay would only have the same bytes sent and read twice (protocol.md 3.10).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Seat = tuple[str, str, int, int]  # peer, session id there, its first block, the block after its last


class Relayed(Protocol):
    """What is asked of a link of the chain."""

    @property
    def peer(self) -> str: ...

    @property
    def relays(self) -> bool:
        """Whether its server hands on what it computed."""

    def seat(self, position: int) -> Seat | None:
        """Where others may hand it a step from ``position`` on; None where its server is not just there."""

    def expect(self) -> None:
        """Its answer to the next step may come before we send that step."""


@dataclass(frozen=True, slots=True)
class Relay:
    """Of a step's message to one server.

    step_id   the step's, the same at all servers
    position  where the step begins; only a message that is all of the step may be relayed
    seats     who comes next, in order
    """

    step_id: str
    position: int
    seats: tuple[Seat, ...] = ()


class RelayPlan:
    """Which servers are named to which. ``is_far``: whether the way to a peer takes long enough to be saved."""

    def __init__(self, is_far: Callable[[str], bool]) -> None:
        self._is_far = is_far
        self._name = uuid.uuid4()
        self._num_steps = 0
        self._step: Relay | None = None

    def begin(self, position: int) -> None:
        """Another step, which goes to each server as one message."""
        self._num_steps += 1
        self._step = Relay(f"{self._name}-{self._num_steps}", position)

    def skip(self) -> None:
        """Another step, which does not."""
        self._step = None

    def relay(self, first: Relayed, following: Sequence[Relayed]) -> Relay | None:
        """What to tell ``first``, whose turn it is; the ``following`` that it names expect the step then."""
        step = self._step
        if step is None or not following or not first.relays:
            return step
        seats: list[Seat] = []
        for link in following:
            seat = link.seat(step.position)
            if seat is None or not self._is_far(link.peer):
                break
            link.expect()
            seats.append(seat)
        return Relay(step.step_id, step.position, tuple(seats))
