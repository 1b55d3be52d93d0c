"""What ``adapter_config.json`` of a LoRA adapter says, as the PEFT library writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from petalsd.errors import WeightsError, shortened

ADAPTER_CONFIG_FILE = "adapter_config.json"

_DEFAULT = 8
"""Of ``r`` and ``lora_alpha`` in PEFT."""

_MAX_ALPHA = 1e6
"""Far above what anybody trains with, and below what leaves the range of numbers."""

# Others begin by changing the base weights, so that the terms belong to weights that we don't have.
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_NOT_COMPUTED = {
    "lora_bias": "its terms have biases",
    "fan_in_fan_out": "its matrices are transposed; no model that is served has such modules",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it changes embeddings, which are the client's",
    "target_parameters": "it adapts what is no linear module",
    "layer_replication": "it repeats blocks",
    "alora_invocation_tokens": "it begins in the middle of a sequence",
}
_ONLY_LINEAR_MODULES = "train it with plain LoRA for the linear modules of the blocks alone"
_DAMAGED = "correct the file, or use another revision of the adapter"

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Rank and alpha of each adapted module. Keys of the patterns are regular expressions for ends of names."""

    rank: int
    alpha: float
    is_rank_stabilized: bool
    rank_pattern: Mapping[re.Pattern[str], int]
    alpha_pattern: Mapping[re.Pattern[str], float]

    @classmethod
    def read(cls, raw: Mapping[str, Any], adapter: str) -> AdapterConfig:
        """WeightsError, which names ``adapter``, for what is no LoRA, not computed here, or makes no sense."""
        fields = _Fields(raw, adapter)
        fields.check_kind()
        return cls(
            rank=fields.rank("r", raw.get("r", _DEFAULT)),
            alpha=fields.alpha("lora_alpha", raw.get("lora_alpha", _DEFAULT)),
            is_rank_stabilized=fields.flag("use_rslora"),
            rank_pattern={
                key: fields.rank("rank_pattern", value) for key, value in fields.by_name("rank_pattern")
            },
            alpha_pattern={
                key: fields.alpha("alpha_pattern", value) for key, value in fields.by_name("alpha_pattern")
            },
        )

    def rank_of(self, module: str) -> int:
        """``module`` is the whole name of one, with its block's."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of the two matrices is multiplied by (Kalajdzievski, 2023, for the stabilized one)."""
        rank = self.rank_of(module)
        alpha = _matching(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)


def _matching(pattern: Mapping[re.Pattern[str], ValueT], module: str, default: ValueT) -> ValueT:
    return next((value for key, value in pattern.items() if key.match(module)), default)


class _Fields:
    """The file's fields, checked."""

    def __init__(self, raw: Mapping[str, Any], adapter: str) -> None:
        self._raw = raw
        self._adapter = adapter

    def check_kind(self) -> None:
        """Refuse what is not computed here, rather than computing something else."""
        raw = self._raw
        if raw.get("peft_type") != "LORA":
            raise self._error("peft_type", raw.get("peft_type"), "only LORA is served")
        if raw.get("bias", "none") != "none":
            raise self._error("bias", raw["bias"], "it changes biases of the model")
        start = raw.get("init_lora_weights")
        if start not in _HARMLESS_STARTS:
            reason = "it was trained beside changed base weights"
            raise self._error("init_lora_weights", start, reason, "convert it to a plain LoRA with peft")
        for field, reason in _NOT_COMPUTED.items():
            if raw.get(field):
                raise self._error(field, raw[field], reason)
        for field, value in raw.items():
            if field.startswith("use_") and value and field != "use_rslora":
                raise self._error(field, value, "this variant of LoRA is not computed")

    def rank(self, field: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(field, value, "a rank is a whole number from 1", _DAMAGED)
        return value

    def alpha(self, field: str, value: object) -> float:
        # NaN is not below anything, and a whole number of any length is.
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _MAX_ALPHA:
            raise self._error(field, value, f"alpha is a finite number, at most {_MAX_ALPHA:g}", _DAMAGED)
        return float(value)

    def flag(self, field: str) -> bool:
        value = self._raw.get(field)
        if value is not None and not isinstance(value, bool):
            raise self._error(field, value, "true or false is needed", _DAMAGED)
        return bool(value)

    def by_name(self, field: str) -> list[tuple[re.Pattern[str], object]]:
        value = self._raw.get(field) or {}
        if not isinstance(value, dict):
            raise self._error(field, value, "not a JSON object", _DAMAGED)
        try:
            return [(re.compile(rf"(.*\.)?({key})$"), entry) for key, entry in value.items()]
        except (re.error, RecursionError) as error:
            raise self._error(field, value, f"not regular expressions: {error}", _DAMAGED) from error

    def _error(
        self, field: str, value: object, reason: str, hint: str = _ONLY_LINEAR_MODULES
    ) -> WeightsError:
        found = f"{ADAPTER_CONFIG_FILE} has {field} = {shortened(value)}"
        return WeightsError(f"adapter {self._adapter}: {found}: {reason}", hint=hint)
