"""What ``doctor`` found: one line each, and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from petalsd.cli.petalsctl.text import Line, Piece, advice, line

Level = Literal["ok", "warn", "fail"]
_STYLES = {"ok": "good", "warn": "bold busy", "fail": "bold bad"}
_NAME_WIDTH = 16


@dataclass(frozen=True, slots=True)
class Finding:
    """``fix`` is what to do, mostly a command; empty when all is well."""

    name: str
    level: Level
    text: str
    fix: str = ""

    def lines(self) -> list[Line]:
        level = Piece(f"{self.level:<4}", _STYLES[self.level])
        hang = _NAME_WIDTH + 8
        first, *more = self.text.split("\n")
        lines = [line(level, f"  {self.name:<{_NAME_WIDTH}}  ", first, hang=hang)]
        lines += [advice(part.strip(), hang) for part in more]
        if self.fix:
            lines.append(line(Piece(f"{'':{hang}}→ {self.fix}", "accent"), hang=hang + 2))
        return lines


Check = Callable[[], Finding | Iterable[Finding]]


def run_checks(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """The findings of each check as soon as it is done; a check that breaks is a finding too."""
    for name, check in checks:
        try:
            found = check()
            yield from [found] if isinstance(found, Finding) else found
        except Exception as error:
            yield Finding(name, "fail", f"could not be looked at: {type(error).__name__}: {error}")
