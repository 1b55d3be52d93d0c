"""What the attention kernels are compiled for and given beside queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from petalsd.kernels.attention_tile import ALIBI_DISTANCES, ALIBI_ROUNDED, NO_ALIBI
from petalsd.ops.launching import Constant
from petalsd.ops.score_rule import ScoreRule


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How queries attend; ``ops.score_rule`` says in which order.

    scale           factor on the scores
    window          a token sees itself and the ``window - 1`` before it; None: everything before it
    softcap         see ScoreRule
    sinks           float32 ``[H]``
    slopes          float32 ``[H]``: ALiBi
    alibi_factor    what the biases are scaled with
    rounds_biases   products of slope and position are rounded to bfloat16, and positions before that, as Falcon
                    was trained; else a bias is slope times distance, as in BLOOM and MPT

    Raises ValueError naming the field and its value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    alibi_factor: float = 1.0
    rounds_biases: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window}: a token sees at least itself")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap = {self.softcap}: it must be positive")
        if self.sinks is not None and self.slopes is not None:
            raise ValueError("linear biases and sinks do not go together")
        for name, values in (("sinks", self.sinks), ("slopes", self.slopes)):
            if values is not None and (values.dtype != torch.float32 or not values.is_contiguous()):
                raise ValueError(f"{name} are {values.dtype}: they must be contiguous float32")

    @classmethod
    def of(cls, scale: float, window: int | None = None, rule: ScoreRule | None = None) -> AttentionRule:
        """The same as ``ops.attention.paged_attention`` does with these arguments."""
        if rule is None:
            return cls(scale, window)
        if rule.alibi is not None and rule.alibi.slopes.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"slopes are {rule.alibi.slopes.dtype}: kernels round products to bfloat16 or not at all"
            )
        return cls(
            scale,
            window,
            rule.softcap,
            sinks=None if rule.sinks is None else rule.sinks.detach().float().contiguous(),
            slopes=None if rule.alibi is None else rule.alibi.slopes.float().contiguous(),
            alibi_factor=1.0 if rule.alibi is None else rule.alibi.factor,
            rounds_biases=rule.alibi is not None and rule.alibi.slopes.dtype == torch.bfloat16,
        )

    @property
    def constants(self) -> dict[str, Constant]:
        """What kernels are compiled for."""
        alibi = NO_ALIBI if self.slopes is None else ALIBI_ROUNDED if self.rounds_biases else ALIBI_DISTANCES
        return {
            "WINDOW": self.window or 0,
            "SOFTCAP": self.softcap is not None,
            "ALIBI": alibi.value,
            "SINKS": self.sinks is not None,
        }

    @property
    def numbers(self) -> tuple[float, float, float]:
        """The kernels' arguments scale, softcap, alibi_factor."""
        return self.scale, self.softcap or 1.0, self.alibi_factor
