"""A server's life cycle as a pure state machine; what is visible outside is a consequence of its state.

    STARTING ──> LOADING ──> ONLINE <──> DRAINING ──> DRAINED ──> ONLINE
                  ^   ^        │            │            │ (a resume finds a part broken)
                  │   └──── REBALANCING <───┴────────────┘
                  └─ (a load that is tried again)      every state but the last ──> STOPPING ──> STOPPED
                                                                              └──> FAILED

REBALANCING also goes back to ONLINE, when a move is over, and to DRAINING, when a stop comes in between; so does
LOADING, when a part of the blocks is served already.

STARTING     parts come up, a span is being chosen; nothing is announced
LOADING      weights of a chosen span are on their way; announced as JOINING, blocks that serve already as ONLINE
ONLINE       serving
REBALANCING  on the way to other blocks, while those in both spans go on serving; or, after a failure, the span was
             given up and another one is being chosen
DRAINING     running sessions finish, new ones are refused; DRAINED when the last one ended
STOPPING     on the way out; FAILED is the same for an error that a restart may heal
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from petalsd.errors import PetalsdError
from petalsd.types import DaemonState

_S = DaemonState
Transitions = Mapping[DaemonState, frozenset[DaemonState]]
TRANSITIONS: Transitions = {
    _S.STARTING: frozenset({_S.LOADING, _S.STOPPING, _S.FAILED}),
    _S.LOADING: frozenset({_S.ONLINE, _S.REBALANCING, _S.DRAINING, _S.STOPPING, _S.FAILED}),
    _S.ONLINE: frozenset({_S.REBALANCING, _S.DRAINING, _S.STOPPING, _S.FAILED}),
    _S.REBALANCING: frozenset({_S.LOADING, _S.ONLINE, _S.DRAINING, _S.STOPPING, _S.FAILED}),
    _S.DRAINING: frozenset({_S.DRAINED, _S.ONLINE, _S.REBALANCING, _S.STOPPING, _S.FAILED}),
    _S.DRAINED: frozenset({_S.ONLINE, _S.REBALANCING, _S.STOPPING, _S.FAILED}),
    _S.STOPPING: frozenset({_S.STOPPED, _S.FAILED}),
    _S.STOPPED: frozenset(),
    _S.FAILED: frozenset(),
}


class IllegalTransition(PetalsdError):
    """A bug: somebody asked for a move that the life cycle does not have."""

    code = "illegal_transition"


Listener = Callable[[DaemonState, DaemonState], None]


class Lifecycle:
    """Owns the state; ``listeners`` hear (old, new) after each move, in the order in which they subscribed."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, transitions: Transitions = TRANSITIONS
    ) -> None:
        self._clock = clock
        self._transitions = transitions
        self._listeners: list[Listener] = []
        self._waiting: list[tuple[DaemonState, asyncio.Future[None]]] = []
        self.state = DaemonState.STARTING
        self.since_s = clock()
        self.reason = ""

    def subscribe(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def until(self, state: DaemonState) -> asyncio.Future[None]:
        """Done with the next move to ``state``."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((state, future))
        return future

    def can_move(self, state: DaemonState) -> bool:
        return state in self._transitions[self.state]

    def move(self, state: DaemonState, reason: str = "") -> None:
        """Go to ``state``; raises IllegalTransition naming both states, and then nothing has changed."""
        if not self.can_move(state):
            raise IllegalTransition(f"the life cycle has no way from {self.state.value} to {state.value}")
        old, self.state = self.state, state
        self.since_s = self._clock()
        self.reason = reason
        for listener in self._listeners:
            listener(old, state)
        for wanted, future in self._waiting:
            if wanted is state and not future.done():
                future.set_result(None)
        self._waiting = [pair for pair in self._waiting if not pair[1].done()]

    @property
    def accepts_sessions(self) -> bool:
        return self.state is DaemonState.ONLINE
