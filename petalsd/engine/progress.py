"""What the engine thread is at, for those who ask whether it still works."""

from __future__ import annotations

import time
from dataclasses import dataclass

_FORGETTING = 0.999  # per batch: a slow one counts for some thousand more


@dataclass(slots=True)
class Progress:
    """Written by the engine thread, read by any other.

    num_steps, num_tokens   answered steps; tokens computed, over all rows, passes not included
    last_step_monotonic_s   when the device last finished something (``time.monotonic``)
    busy_since_monotonic_s  since when it has been at what it does now; None while it is idle
    busy_tokens             tokens of that, over all rows; a pass counts as the most it computes at once
    slowest_token_s         seconds per token of the slowest batches so far, forgotten slowly
    """

    num_iterations: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    last_step_monotonic_s: float = 0.0
    busy_since_monotonic_s: float | None = None
    busy_tokens: int = 0
    slowest_token_s: float = 0.0

    def begin(self, tokens: int) -> float:
        """The device is at these from now on; the time."""
        self.busy_tokens = tokens
        self.busy_since_monotonic_s = now = time.monotonic()
        return now

    def end(self) -> None:
        """What began is done."""
        self.last_step_monotonic_s = now = time.monotonic()
        if self.busy_since_monotonic_s is not None and self.busy_tokens:
            token_s = (now - self.busy_since_monotonic_s) / self.busy_tokens
            self.slowest_token_s = max(token_s, self.slowest_token_s * _FORGETTING)
        self.num_iterations += 1
        self.busy_since_monotonic_s = None

    def abandon(self) -> None:
        """What began is over, and proves nothing."""
        self.busy_since_monotonic_s = None
