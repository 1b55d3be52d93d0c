"""Rotary angles from the module with which a family of transformers computes them, for any rows of a batch."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from petalsd.errors import UnsupportedModel
from petalsd.models.hf.family import Family
from petalsd.models.model_config import ModelConfig
from petalsd.models.rope import LengthRegimes, unusable

_MAX_MODULES = 64
_FIRST_TABLE_POSITIONS = 1024


class LayerAngles:
    """Shared by all blocks of a model; ``contract.Angles`` says what the engine asks of it.

    Where layer types rotate differently (``layer_types`` is then not empty), each type has its two tensors, in
    this order. A family without rotary embeddings has none at all.
    """

    def __init__(
        self, family: Family, hf: Any, config: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.layer_types: tuple[str, ...] = ()
        self._example = torch.empty(
            0, dtype=dtype, device=device
        )  # the modules take dtype and device from it
        self._module = _rotary_module(family, hf, config)
        if self._module is not None:
            self._module.to(device)
            if "layer_type" in inspect.signature(self._module.forward).parameters:
                self.layer_types = tuple(dict.fromkeys(hf.layer_types))
            self._check(self._module, config)
        self._regimes = _length_regimes(config)
        self._of_regime = functools.lru_cache(_MAX_MODULES)(lambda _: _copy_of(self._module))
        self._table: tuple[torch.Tensor, ...] = ()

    @property
    def is_length_dependent(self) -> bool:
        return self._regimes is not None

    def _check(self, module: nn.Module, config: ModelConfig) -> None:
        """ModelError unless there are angles, and all of them are numbers."""
        try:
            angles = self._compute(module, torch.arange(2, device=self.device))
        except Exception as error:
            raise unusable(config.rope, repr(error)) from error
        if not all(bool(torch.isfinite(part).all()) for part in angles):
            raise unusable(config.rope, "its angles are not finite")

    def slice_of(self, layer_type: str | None) -> slice:
        """Where the tensors for a block of this type are among those of ``cos_sin``."""
        if self._module is None:
            return slice(0, 0)
        first = 2 * self.layer_types.index(layer_type) if self.layer_types and layer_type else 0
        return slice(first, first + 2)

    def cos_sin(
        self, positions: torch.Tensor, seq_lens: torch.Tensor | None = None, end: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """As ``Rope.cos_sin``; as many tensors ``[T, …]`` as the family needs."""
        if self._module is None:
            return ()
        if end is None:
            end = int(positions.max()) + 1 if positions.numel() else 0
        if self._regimes is not None:
            lengths = [end] * len(positions) if seq_lens is None else seq_lens.tolist()
            regimes = [self._regimes.of(length) for length in lengths]
            if any(regimes):
                return self._by_regime(positions, regimes)
        return tuple(part.index_select(0, positions) for part in self.tables(end))

    def tables(self, end: int) -> tuple[torch.Tensor, ...]:
        """As ``Rope.tables``: as many as ``cos_sin`` has."""
        if self._module is None:
            return ()
        if not self._table or end > len(self._table[0]):
            self._table = self._compute(self._module, torch.arange(self._table_size(end), device=self.device))
        return self._table

    def _table_size(self, end: int) -> int:
        """Positions of short rows that a table covers; it doubles, so that growing stays rare."""
        size = max(end, 2 * len(self._table[0]) if self._table else 0, _FIRST_TABLE_POSITIONS)
        return size if self._regimes is None else min(size, self._regimes.limit)

    def _by_regime(self, positions: torch.Tensor, regimes: list[int]) -> tuple[torch.Tensor, ...]:
        """Each token with the frequencies of its row's length."""
        kinds = torch.tensor(regimes, device=positions.device)
        parts: tuple[torch.Tensor, ...] = ()
        for regime in dict.fromkeys(regimes):
            chosen = (kinds == regime).nonzero().squeeze(1)
            # The modules look at the largest position, which is the row's last.
            longest = positions.new_tensor([max(regime, 1) - 1])
            computed = self._compute(self._of_regime(regime), torch.cat((positions[chosen], longest)))
            if not parts:
                parts = tuple(part.new_empty(len(positions), *part.shape[1:]) for part in computed)
            for part, new in zip(parts, computed, strict=True):
                part[chosen] = new[:-1]
        return parts

    @torch.inference_mode(False)
    @torch.no_grad()
    def _compute(self, module: nn.Module, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = positions[None].clone()
        arguments: list[tuple[str, ...]] = [(one,) for one in self.layer_types] or [()]
        computed = [module(self._example, rows, *argument) for argument in arguments]
        return tuple(part.squeeze(0) for pair in computed for part in pair)


def _rotary_module(family: Family, hf: Any, config: ModelConfig) -> nn.Module | None:
    if family.rotary is None or not config.rope:
        return None
    for rope in (config.rope, *config.rope.values()):
        share = rope.get("partial_rotary_factor", 1.0) if isinstance(rope, Mapping) else 1.0
        if not isinstance(share, float | int) or not 0 < share <= 1:
            raise unusable(config.rope, f"partial_rotary_factor = {share!r} is not in (0, 1]")
    try:
        module: nn.Module = getattr(family.module, family.rotary)(hf)
    except Exception as error:  # scalings are code of transformers, and of its kinds of models
        raise unusable(config.rope, repr(error)) from error
    return module


@torch.inference_mode(False)
def _copy_of(module: Any) -> nn.Module:
    """With frequencies of its own, which its calls change."""
    copied: nn.Module = copy.deepcopy(module, {id(module.config): module.config})
    return copied


def _length_regimes(config: ModelConfig) -> LengthRegimes | None:
    per_type = [value for value in config.rope.values() if isinstance(value, dict)]
    if any(LengthRegimes.read(rope, config.max_positions) for rope in per_type):
        raise UnsupportedModel(
            f"rope_parameters = {dict(config.rope)}: angles that depend on a row's length and its layer's type"
        )
    return None if per_type else LengthRegimes.read(config.rope, config.max_positions)
