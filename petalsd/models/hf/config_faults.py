"""What transformers raises over a config.json that makes no sense to it, as an error that names keys of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from petalsd.errors import ModelError, PetalsdError, shortened

T = TypeVar("T")

_MAX_REASON = 160
_NUM_LAST = 3


def made_from(hf: Any, what: str, make: Callable[[Any], T]) -> T:
    """``make(hf)`` of transformers' config ``hf``. ModelError, about ``what``, for all that its code raises."""
    try:
        return make(hf)
    except PetalsdError:
        raise
    except Exception as error:
        raise ModelError(
            f"config.json is no valid {hf.model_type} configuration: {what}: {reason_of(error)}; "
            f"{_suspects(hf, make, isinstance(error, TypeError))}",
            hint="correct the file, or use another revision of the model",
        ) from error


def reason_of(error: Exception) -> str:
    """Its type and what it says, as a part of a sentence."""
    return " ".join(f"{type(error).__name__} {error}".split())[:_MAX_REASON]


def _suspects(hf: Any, make: Callable[[Any], object], may_lack: bool) -> str:
    """The keys without a value among those that ``make`` reads before it fails, else the last few."""
    watched = _Watched(hf)
    with contextlib.suppress(Exception):
        make(watched)
    empty = [name for name, value in watched.read.items() if value is None]
    if empty and may_lack:
        return f"null or missing: {', '.join(empty)}"
    last = list(watched.read.items())[-_NUM_LAST:]
    return f"read last: {', '.join(f'{name} = {shortened(value)}' for name, value in last)}"


class _Watched:
    """A config that knows which of its keys were read, the latest last."""

    def __init__(self, hf: Any) -> None:
        self.read: dict[str, Any] = {}
        self._hf = hf

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._hf, name)
        if not name.startswith("_") and not callable(value):
            self.read.pop(name, None)
            self.read[name] = value
        return value
