"""Rotary angles for any positions, with every scaling that transformers knows.

The frequencies come from transformers' own functions. Two scalings (dynamic, longrope) depend on how long the row
is at a step; there each token brings its row's length, and the result equals transformers' for a row alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from petalsd.errors import ModelError
from petalsd.models.block_config import BlockConfig
from petalsd.models.model_config import MAX_POSITIONS, check_count

_MAX_CACHED_LENGTHS = 1024
_FIRST_TABLE_POSITIONS = 1024


@dataclass(frozen=True, slots=True)
class LengthRegimes:
    """How frequencies depend on the length of a token's row: not at all up to ``limit``, then by ``rope_type``."""

    rope_type: str
    limit: int

    @classmethod
    def read(cls, rope: Mapping[str, Any], max_positions: int) -> LengthRegimes | None:
        """From ``rope_parameters``; None when the length never matters, ModelError when it makes no sense."""
        if rope.get("rope_type") == "dynamic":
            return cls("dynamic", max_positions)
        if rope.get("rope_type") == "longrope":
            key = "original_max_position_embeddings"
            original = rope.get(key, max_positions)
            check_count(key, original, MAX_POSITIONS)
            return cls("longrope", int(original))
        return None

    def of(self, length: int) -> int:
        """The smallest length with the same frequencies; 0 for the frequencies of short rows."""
        if length <= self.limit:
            return 0
        return length if self.rope_type == "dynamic" else self.limit + 1


class Rope:
    """Shared by all blocks of a model; the runner asks it once per batch. ``dtype`` is the model's."""

    def __init__(self, config: BlockConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.rope_type: str = config.rope["rope_type"]
        self._regimes = LengthRegimes.read(config.rope, config.max_positions)
        self._config = config
        self._frequencies = functools.lru_cache(_MAX_CACHED_LENGTHS)(self._compute_frequencies)
        nothing = torch.empty(0, config.head_dim, dtype=dtype, device=device)
        self._table = (nothing, nothing)

    @property
    def is_length_dependent(self) -> bool:
        return self._regimes is not None

    def cos_sin(
        self, positions: torch.Tensor, seq_lens: torch.Tensor | None = None, end: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of tokens at ``positions`` ``[T]`` int64.

        seq_lens  ``[T]`` int64, needed only if ``is_length_dependent``: how long each token's row is at the end of
                  the step that the token belongs to (of the whole step, also when it is computed in chunks). None:
                  all tokens belong to one row, which ends at the largest position
        end       one more than the largest position, from a caller who knows it without asking the device

        Returns two ``[T, D]`` in the model's dtype, computed in float32; both halves hold the same angles.
        """
        if end is None:
            end = int(positions.max()) + 1 if positions.numel() else 0
        if self._regimes is not None:
            lengths = [end] if seq_lens is None else seq_lens.tolist()
            regimes = [self._regimes.of(length) for length in lengths]
            if any(regimes):
                return self._angles(positions, regimes)
        cos, sin = self.tables(end)
        if positions.shape[0] == 1:
            return cos[end - 1 : end], sin[end - 1 : end]
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def tables(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all positions below ``end``, and perhaps more, for rows that are short: two ``[L, D]``."""
        if end > len(self._table[0]):
            self._grow_table(end)
        return self._table

    def table(self, end: int) -> torch.Tensor:
        """``[end, 2, D/2]`` float32 of positions below ``end``: cosines, then sines, for rows that are short."""
        cos, sin = self._wide_angles(torch.arange(end, device=self.device), [0])
        return torch.stack((cos, sin), dim=1)

    def _grow_table(self, end: int) -> None:
        """Cover positions below ``end`` for rows of regime 0, doubling so that growing stays rare."""
        size = max(end, 2 * len(self._table[0]), _FIRST_TABLE_POSITIONS)
        # A step may be the first to ask, and autograd keeps no views of what was made in inference mode.
        with torch.inference_mode(False):
            self._table = self._angles(torch.arange(size, device=self.device), [0])

    def _angles(self, positions: torch.Tensor, regimes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Two ``[T, D]`` in the model's dtype. ``regimes``: one for all tokens, or one per token."""
        cos, sin = (torch.cat((half, half), dim=-1) for half in self._wide_angles(positions, regimes))
        return cos.to(self.dtype), sin.to(self.dtype)

    def _wide_angles(self, positions: torch.Tensor, regimes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Likewise, two ``[T, D/2]`` float32."""
        frequencies, attention_scaling = self._frequencies(regimes[0])
        if len(set(regimes)) > 1:
            frequencies = torch.stack([self._frequencies(regime)[0] for regime in regimes])
        angles = positions[:, None].float() * frequencies
        return angles.cos() * attention_scaling, angles.sin() * attention_scaling

    def _seq_len(self, regime: int) -> int | torch.Tensor | None:
        """As transformers hands it over: a tensor where the base is computed from it, which rounds differently."""
        if regime == 0:
            return None
        return torch.tensor(regime) if self.rope_type == "dynamic" else regime

    def _compute_frequencies(self, length: int) -> tuple[torch.Tensor, float]:
        """Float32 ``[D/2]`` and the factor; length 0 means a row as short as can be."""
        config = self._config
        compute: Callable[..., tuple[torch.Tensor, float]] = ROPE_INIT_FUNCTIONS.get(
            self.rope_type, _default_frequencies
        )
        carrier = PreTrainedConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_positions,
            rope_parameters=dict(config.rope),
        )
        try:
            frequencies, scaling = compute(carrier, device=self.device, seq_len=self._seq_len(length))
            attention_scaling = float(scaling)
        except Exception as error:  # the functions take what config.json has for what they need
            raise unusable(config.rope, repr(error)) from error
        if not (math.isfinite(attention_scaling) and bool(torch.isfinite(frequencies).all())):
            raise unusable(config.rope, "its frequencies are not finite")
        if frequencies.shape != (config.head_dim // 2,):
            raise ModelError(
                f"rope_parameters give {frequencies.shape[0]} frequencies, head_dim = {config.head_dim} "
                f"needs {config.head_dim // 2}"
            )
        return frequencies.to(self.device), attention_scaling


def unusable(rope: Mapping[str, Any], why: str) -> ModelError:
    return ModelError(
        f"rope_parameters = {dict(rope)} in config.json cannot be used: {why}",
        hint="correct them, or use another revision of the model",
    )


def _default_frequencies(
    config: PreTrainedConfig, device: torch.device, seq_len: int | torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    """Unscaled: ``theta^(-2i/D)``, in the order of operations of transformers' models."""
    dim = config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0
