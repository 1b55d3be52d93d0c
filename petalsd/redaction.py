"""What may stand in a log line: names, numbers and short texts; never what was computed, and no frame's locals.

Tensors and bytes come into logs by accident: as a field, in the arguments of an exception, inside a library's
message. Whatever is no plain value becomes the name of its type, and what looks like numbers in a text goes.
"""

from __future__ import annotations

import enum
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from structlog.typing import EventDict, WrappedLogger

MAX_TEXT_CHARS = 8192
MAX_ITEMS = 64
_MAX_DEPTH = 4
_MAX_CHAIN = 8  # exceptions that led to one another, or that one group holds

# Nested brackets as deep as in tensor([1.], size=(2, 3)); the end may have been cut off.
_TENSOR = re.compile(r"\b(tensor|array)\((?:[^()]|\([^()]*\))*\)?")
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|inf)"
_NUMBERS = re.compile(rf"(?<![\w.])(?:{_NUMBER}[\s,\[\]()]+){{7,}}{_NUMBER}")
_BYTES = re.compile(r"(?:\\(?:x[0-9a-fA-F]{2}|[0-7]{3})[^\\\n'\"]{0,8}){8,}")


def redact(logger: WrappedLogger, name: str, event_dict: EventDict) -> EventDict:
    """A structlog processor that leaves only plain values, and ``exc_info`` to the renderer of exceptions."""
    return {key: value if key == "exc_info" else plain(value) for key, value in event_dict.items()}


def plain(value: object, depth: int = _MAX_DEPTH) -> Any:
    """``value`` as JSON knows it; anything else but paths, enums and errors as ``<TypeName>``."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | PurePath):
        return scrubbed(str(value))
    if isinstance(value, BaseException):
        return exception_summary(value)
    if depth and isinstance(value, Mapping):
        items = list(value.items())[:MAX_ITEMS]
        return {scrubbed(str(key)): plain(item, depth - 1) for key, item in items}
    if depth and isinstance(value, list | tuple | set | frozenset):
        rest = [f"and {len(value) - MAX_ITEMS} more"] if len(value) > MAX_ITEMS else []
        return [plain(item, depth - 1) for _, item in zip(range(MAX_ITEMS), value, strict=False)] + rest
    return f"<{type(value).__name__}>"


def scrubbed(text: str) -> str:
    """``text`` without printed tensors, runs of numbers and escaped bytes, and not longer than is read."""
    if len(text) > MAX_TEXT_CHARS:
        text = f"{text[:MAX_TEXT_CHARS]}… ({len(text) - MAX_TEXT_CHARS} more characters)"
    text = _TENSOR.sub(r"<\1>", text)
    text = _NUMBERS.sub("<numbers>", text)
    return _BYTES.sub("<bytes>", text)


def exception_records(error: BaseException) -> list[dict[str, Any]]:
    """``error`` and what it came from, the last first: type, text, frames without locals, ``is_cause``."""
    return [
        {
            "exc_type": type(link).__name__,
            "exc_value": _text_of(link),
            "is_cause": is_cause,
            "frames": [
                {"filename": frame.filename, "lineno": frame.lineno, "name": frame.name}
                for frame in traceback.extract_tb(link.__traceback__)
            ],
        }
        for link, is_cause in _chain(error)
    ]


def exception_text(error: BaseException) -> str:
    """As Python prints it, the last error at the end."""
    parts: list[str] = []
    for link, is_cause in reversed(list(_chain(error))):
        lines = traceback.format_list(traceback.extract_tb(link.__traceback__))
        head = "Traceback (most recent call last):\n" if lines else ""
        parts.append(f"{head}{''.join(lines)}{type(link).__name__}: {_text_of(link)}")
        parts.append("which caused:" if is_cause else "during which there was:")
    return "\n\n".join(parts[:-1])


def exception_summary(error: BaseException) -> str:
    """Type and first line."""
    return f"{type(error).__name__}: {_text_of(error)}".partition("\n")[0]


def _text_of(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # its own __str__ is broken: there is still its type to show
        text = "<no text>"
    return scrubbed("\n".join([text, *map(str, getattr(error, "__notes__", ()))]))


def _chain(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """``error`` first; each with whether it is the declared cause of one before, as the members of a group are."""
    waiting: list[tuple[BaseException, bool]] = [(error, False)]
    seen: set[int] = set()
    while waiting and len(seen) < _MAX_CHAIN:
        link, is_cause = waiting.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link, is_cause
        if isinstance(link, BaseExceptionGroup):
            waiting += [(member, True) for member in link.exceptions]
        if link.__cause__ is not None:
            waiting.append((link.__cause__, True))
        elif link.__context__ is not None and not link.__suppress_context__:
            waiting.append((link.__context__, False))
