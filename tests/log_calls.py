"""Every call of a structlog logger in the package, found in its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "petalsd"
LEVELS = {"debug", "info", "warning", "error", "critical", "exception", "log"}


@dataclass(frozen=True, slots=True)
class LogCall:
    """``event``: the literal that names it; None if there is none. ``extra``: positional arguments after it."""

    place: str
    event: str | None
    extra: int
    keywords: tuple[ast.keyword, ...]


def log_calls() -> Iterator[LogCall]:
    """Calls like ``log.info(...)`` where structlog made ``log``, and of names that stand for such a method."""
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text()
        if "structlog.get_logger" not in source:
            continue
        tree = ast.parse(source)
        aliases = _aliases(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _is_log_method(node.func, aliases):
                yield _log_call(node, f"{path.relative_to(PACKAGE)}:{node.lineno}")


def _is_log_method(function: ast.expr, aliases: set[str]) -> bool:
    return _is_log_attribute(function) or (isinstance(function, ast.Name) and function.id in aliases)


def _is_log_attribute(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr in LEVELS
        and isinstance(node.value, ast.Name)
        and node.value.id == "log"
    )


def _aliases(tree: ast.Module) -> set[str]:
    """note = log.debug if ... else log.info"""
    return {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and any(map(_is_log_attribute, ast.walk(node.value)))
        for target in node.targets
        if isinstance(target, ast.Name) and not isinstance(node.value, ast.Call)
    }


def _log_call(node: ast.Call, place: str) -> LogCall:
    assert isinstance(node.func, ast.Attribute | ast.Name)
    words = node.args[1:] if isinstance(node.func, ast.Attribute) and node.func.attr == "log" else node.args
    first = words[0] if words else None
    is_literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
    event = first.value if is_literal and isinstance(first, ast.Constant) else None
    return LogCall(place, event, len(words) - 1, tuple(node.keywords))
