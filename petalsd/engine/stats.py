"""What the engine says of itself when it is asked."""

from __future__ import annotations

from dataclasses import dataclass

from petalsd.engine.captures import Captures
from petalsd.engine.progress import Progress


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The figures of a moment.

    sessions                open ones, the canary's aside
    rows                    what counts towards max_sessions: B for a session of batch size B, also while it waits
    queued_passes           forward and backward passes that are not answered yet
    steps_total             steps answered since the start
    tokens_total            tokens computed in steps, over all rows
    iterations_total        batches and units of passes
    last_step_monotonic_s   when the device last finished something; 0 when it never did
    busy_since_monotonic_s  since when the device has been at what it does now; None while it is idle
    busy_tokens             tokens of what it does now, or did last
    slowest_token_s         seconds per token of the slowest batches so far
    graphs, graph_bytes     captured steps, and the device memory that they take
    graphs_wanted           how many there are to be; 0 where nothing is captured
    graphs_failure          why the rest is not captured
    """

    sessions: int
    rows: int
    queued_passes: int
    steps_total: int
    tokens_total: int
    iterations_total: int
    last_step_monotonic_s: float
    busy_since_monotonic_s: float | None
    busy_tokens: int
    slowest_token_s: float
    graphs: int = 0
    graph_bytes: int = 0
    graphs_wanted: int = 0
    graphs_failure: str | None = None

    @classmethod
    def of(
        cls, progress: Progress, sessions: int, rows: int, queued_passes: int, captures: Captures | None
    ) -> EngineStats:
        """With what the engine thread writes down of its work, and the captured steps of what is served."""
        return cls(
            sessions=sessions,
            rows=rows,
            queued_passes=queued_passes,
            steps_total=progress.num_steps,
            tokens_total=progress.num_tokens,
            iterations_total=progress.num_iterations,
            last_step_monotonic_s=progress.last_step_monotonic_s,
            busy_since_monotonic_s=progress.busy_since_monotonic_s,
            busy_tokens=progress.busy_tokens,
            slowest_token_s=progress.slowest_token_s,
            graphs=0 if captures is None else captures.num_graphs,
            graph_bytes=0 if captures is None else captures.nbytes,
            graphs_wanted=0 if captures is None else captures.num_wanted,
            graphs_failure=None if captures is None else captures.failure,
        )
