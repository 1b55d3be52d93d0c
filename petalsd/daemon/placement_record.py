"""What checks of the placement came to: a line and a count for each, and what a move was worth in the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import structlog

from petalsd.metrics import Metrics, Reading
from petalsd.swarm.placement.decision import Decision, Verdict
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Promise:
    """What a move is to do: rates of the swarm's weakest block in tokens/s."""

    target: BlockSpan
    weakest_before: float
    weakest_after: float

    @property
    def gain(self) -> float:
        return self.weakest_after - self.weakest_before


class PlacementRecord:
    """Told of every check of the daemon itself, in their order."""

    def __init__(self, metrics: Metrics) -> None:
        counter = metrics.counter("placement_checks_total")
        self._checks = {verdict: counter.labels(verdict.value) for verdict in Verdict}
        self._gains: Mapping[str, float] = {}
        self._promise: _Promise | None = None

    def checked(self, decision: Decision) -> None:
        """The first check after a move that sees it done is also what the move is judged by."""
        figures = decision.estimate
        self._checks[decision.verdict].inc()
        say = log.info if decision.is_move else log.debug
        say(
            "placement_checked",
            verdict=decision.verdict.value,
            span=str(decision.span),
            target=str(decision.target),
            weakest_before=round(figures.weakest_before, 3),
            weakest_after=round(figures.weakest_after, 3),
            gain_tokens=round(figures.gain_tokens),
            cost_tokens=round(figures.cost_tokens),
            ahead=len(decision.ahead),
        )
        if decision.verdict is not Verdict.LOADING:
            self._judge(decision.span, figures.weakest_before)
        if decision.is_move:
            self._promise = _Promise(decision.target, figures.weakest_before, figures.weakest_after)

    def read(self) -> Iterable[Reading]:
        """The gauges of the last move that was judged; none before."""
        return [Reading("move_gain_tokens_per_second", gain, (kind,)) for kind, gain in self._gains.items()]

    def _judge(self, span: BlockSpan, weakest_now: float) -> None:
        """Others have moved meanwhile, so the gain is the swarm's and not ours alone."""
        promise, self._promise = self._promise, None
        if promise is None or promise.target != span:  # the move failed, or went elsewhere
            return
        realised = weakest_now - promise.weakest_before
        self._gains = {"predicted": promise.gain, "realised": realised}
        log.info(
            "move_judged",
            span=str(span),
            predicted_gain=round(promise.gain, 3),
            realised_gain=round(realised, 3),
            weakest_now=round(weakest_now, 3),
        )
