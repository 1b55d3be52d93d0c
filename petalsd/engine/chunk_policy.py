"""How much prefill, or work on a pass, may go on beside sessions that decode: a pure policy over floats.

The unit is the *undisturbed* iteration: the decode rows of now alone. The promises, as far as the cost model is
right and a chunk of the least size allows:

* An iteration with a chunk of prefill in it takes at most ``ITERATION_BOUND`` undisturbed ones.
* Nobody who decodes waits for more than ``STEP_BOUND`` of them from handing a step in to its answer. A step that
  came while a chunk ran, and so has waited already, takes a smaller one along or none.
* Prefill is never left out twice in a row.

An iteration of less than ``UNNOTICED_S`` disturbs nobody, whatever its part of undisturbed ones: steps come over
networks. Where decode takes a fraction of that, as on a GPU, bounds of its multiples would cut prompts into pieces
that cost much more than they hold.
"""

from __future__ import annotations

import math

from petalsd.engine.iteration_cost import NO_WORK, CostModel, Work

ITERATION_BOUND = 2.0
STEP_BOUND = 2.5
UNNOTICED_S = 0.004
DECODE_MEMORY_S = 1.0  # so long after a decode its client is expected back, and chunks stay bounded
DECODE_MEMORY_ITERATIONS = 8.0  # the same in undisturbed iterations, for models that are slow
LEAST_SHARE = 0.5  # a chunk of less work than this part of the reading that it rides on doesn't pay
UNLIMITED = 2.0**62


class ChunkPolicy:
    """Learns from ``ran`` and answers for the next iteration."""

    def __init__(self) -> None:
        self._decode_cost = CostModel()
        self._prefill_cost = CostModel()
        self._decode_work = NO_WORK
        self._decoded_at = -math.inf
        self._has_skipped = False

    @property
    def undisturbed_s(self) -> float:
        """What the decode rows of last time take alone; 0 when there never were any, or nothing was measured."""
        cost = _known(self._decode_cost, self._prefill_cost)
        return cost.seconds(self._decode_work) if cost.is_known else 0.0

    def ran(self, work: Work, has_prefill: bool, seconds: float) -> None:
        """An iteration ended; its duration alone, without what came before or after."""
        (self._prefill_cost if has_prefill else self._decode_cost).observe(work, seconds)

    def decodes(self, work: Work, now: float) -> None:
        """The next iteration has these decode rows; ``work`` counts the weights too."""
        self._decode_work = work
        self._decoded_at = now

    def expects(self, now: float) -> None:
        """A prefill was answered: its session is about to decode."""
        self._decoded_at = now

    def is_quiet(self, now: float) -> bool:
        """Whether nobody is expected to decode soon."""
        memory_s = max(DECODE_MEMORY_S, DECODE_MEMORY_ITERATIONS * self.undisturbed_s)
        return now - self._decoded_at > memory_s

    def prefill_tokens(self, decode: Work, num_blocks: int, waited_s: float) -> float:
        """What prefill may add to an iteration, in ``Work.tokens``; 0: nothing this time.

        decode      the work of the iteration's decode rows, nothing if there are none
        num_blocks  through which a prefill may go
        waited_s    for which one of the rows has waited by now
        """
        cost = _known(self._prefill_cost, self._decode_cost)
        fixed = Work(max(decode.reads, num_blocks), decode.tokens)
        undisturbed_s = self.undisturbed_s or cost.seconds(fixed)
        if not decode.tokens:  # somebody may come when the iteration has just begun
            waited_s = undisturbed_s
        bound_s = min(ITERATION_BOUND * undisturbed_s, STEP_BOUND * undisturbed_s - waited_s)
        bound_s = max(bound_s, UNNOTICED_S)
        most = (bound_s - cost.seconds(fixed)) / cost.token_s
        least = LEAST_SHARE * cost.read_s * num_blocks / cost.token_s
        self._has_skipped = decode.tokens > 0 and most < least and not self._has_skipped
        return 0.0 if self._has_skipped else max(most, least)

    def pass_s(self) -> float:
        """Seconds for the units of a pass that follow an iteration without prefill; infinite: nobody knows."""
        undisturbed_s = self.undisturbed_s
        return max((ITERATION_BOUND - 1) * undisturbed_s, UNNOTICED_S) if undisturbed_s else math.inf


def _known(cost: CostModel, other: CostModel) -> CostModel:
    """``cost``, unless only the other one has seen anything."""
    return cost if cost.is_known or not other.is_known else other
