"""What one engine accepts and how much it computes at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from petalsd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Every bound of the engine, all greater than zero; ConfigError names the one that is not.

    max_batch_tokens      tokens that one iteration computes over all sessions, at least 2
    prefill_chunk_tokens  the share of it that decode leaves to a waiting prefill, and the most rows of a session;
                          how much of a prefill really runs beside decode depends on what that takes
    max_sessions          session rows open at once: a session of batch size B counts B times
    max_peer_share        of them, what one peer may have; its first session may be larger
    max_session_tokens    positions per row, for sessions and for the rows of a forward or backward pass
    max_pass_tokens       tokens of a forward or backward pass that are in memory and computed at once at most
    max_queued_passes     forward and backward passes that may wait, half of them of one peer
    step_deadline_s       longest time from handing in a step to its answer
    pass_deadline_s       the same for a forward or backward pass
    """

    max_batch_tokens: int = 1024
    prefill_chunk_tokens: int = 256
    max_sessions: int = 256
    max_peer_share: float = 1.0
    max_session_tokens: int = 8192
    max_pass_tokens: int = 2048
    max_queued_passes: int = 64
    step_deadline_s: float = 300.0
    pass_deadline_s: float = 180.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 2 if field.name == "max_batch_tokens" else 0
            if not value > 0 or value < least:
                raise ConfigError(f"engine limit {field.name} = {value}: must be at least {max(least, 1)}")

    @property
    def chunk_tokens(self) -> int:
        """``prefill_chunk_tokens``, but at most half of a batch, so that neither side can starve the other."""
        return min(self.prefill_chunk_tokens, self.max_batch_tokens // 2)

    @property
    def max_passes_per_peer(self) -> int:
        """Half of ``max_queued_passes``: who sends more than is computed is refused, and not everybody."""
        return -(-self.max_queued_passes // 2)

    @property
    def max_rows_per_peer(self) -> int:
        """``max_peer_share`` of ``max_sessions``."""
        return max(1, int(self.max_sessions * self.max_peer_share))

    @property
    def max_session_rows(self) -> int:
        """Rows of one session: one token of each must fit a prefill chunk."""
        return min(self.max_sessions, self.chunk_tokens)
