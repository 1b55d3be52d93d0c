"""What the engine tells whoever measures it. It counts nothing for them, and knows nobody of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from petalsd.engine.iteration_cost import NO_WORK, Work


class StepTiming(NamedTuple):
    """An answered step: from handing it in to its first token being computed, and to its answer."""

    is_prefill: bool
    queue_s: float
    total_s: float


class PassTiming(NamedTuple):
    """An answered pass of ``tokens`` tokens over all rows; the times as in StepTiming.

    ``device_s`` is what its units took that did ``work``, without the waits between them.
    """

    is_backward: bool
    tokens: int
    queue_s: float
    total_s: float
    work: Work = NO_WORK
    device_s: float = 0.0


@dataclass(slots=True)
class BatchReport:
    """One batch of steps, self-tests left out: what the device computed at once, and the steps this completed.

    Tokens count over all rows; a chunk of a prefill is prefill whatever its size. ``work`` is what took that long;
    nothing when the batch was another than planned.
    """

    duration_s: float = 0.0
    work: Work = NO_WORK
    rows: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    steps: list[StepTiming] = field(default_factory=list)


class EngineObserver(Protocol):
    """Called after the answers are on their way. Must be quick, and must not raise."""

    def batch_done(self, report: BatchReport) -> None:
        """On the loop, after each batch that had a client's step in it."""

    def pass_done(self, timing: PassTiming) -> None:
        """On the loop."""

    def span_computed(self, *, is_replayed: bool) -> None:
        """On the engine thread, where steps are captured: blocks were computed in a step, by graphs or without."""

    def session_admitted(self, wait_s: float) -> None:
        """On the loop: a session got its pages, after waiting for them."""


class NullObserver:
    """Looks away."""

    def batch_done(self, report: BatchReport) -> None:
        pass

    def pass_done(self, timing: PassTiming) -> None:
        pass

    def span_computed(self, *, is_replayed: bool) -> None:
        pass

    def session_admitted(self, wait_s: float) -> None:
        pass
