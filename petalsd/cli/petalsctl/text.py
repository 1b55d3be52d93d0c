"""Lines of styled text and tables of them; what a line may hold is decided here.

Names, addresses and reasons in a document may come from strangers in the swarm: whatever is not printable is
replaced, so that nobody's name can drive the reader's terminal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ELLIPSIS = "…"
_STYLES = {
    "": "",
    "bold": "1",
    "dim": "2",
    "good": "32",
    "busy": "33",
    "bad": "31",
    "bold good": "1;32",
    "bold busy": "1;33",
    "bold bad": "1;31",
    "accent": "36",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one style."""

    text: str
    style: str = ""


Line = tuple[Piece, ...]
EMPTY: Line = ()


def line(*parts: Piece | str) -> Line:
    return tuple(Piece(part) if isinstance(part, str) else part for part in parts)


def printable(text: str) -> str:
    """``text`` without anything that a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def width_of(text: str) -> int:
    """Columns of a terminal."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def clip(text: str, width: int) -> str:
    """At most ``width`` columns, with an ellipsis where something is left out."""
    if width_of(text) <= width:
        return text
    if width <= 0:
        return ""
    kept, used = [], 0
    for character in text:
        used += _columns(character)
        if used > width - 1:
            break
        kept.append(character)
    return "".join(kept) + ELLIPSIS


def clip_middle(text: str, width: int) -> str:
    """As ``clip``, but keeps the beginning and the end: what tells PeerIDs apart is their end."""
    if len(text) <= width or width < 3:
        return clip(text, width)
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}{ELLIPSIS}{text[-tail:]}"


def render(content: Line, width: int, *, is_coloured: bool) -> str:
    """One line for the terminal, not wider than ``width``; no line end."""
    shown: list[str] = []
    left = width
    for piece in content:
        text = clip(printable(piece.text), left)
        left -= width_of(text)
        codes = _STYLES[piece.style] if is_coloured else ""
        shown.append(f"\x1b[{codes}m{text}\x1b[0m" if codes and text else text)
        if left <= 0:
            break
    return "".join(shown).rstrip() if not is_coloured else "".join(shown)


@dataclass(frozen=True, slots=True)
class Column:
    """``max_width`` bounds what one long value may do to the others."""

    title: str
    is_right: bool = False
    max_width: int = 40


def table(columns: Sequence[Column], rows: Sequence[Sequence[Piece | str]]) -> list[Line]:
    """A heading and aligned rows, two spaces apart."""
    cells = [[_cell(value, column) for value, column in zip(row, columns, strict=True)] for row in rows]
    widths = [
        max([width_of(column.title), *(width_of(row[index].text) for row in cells)])
        for index, column in enumerate(columns)
    ]
    heading = [Piece(column.title.upper(), "dim") for column in columns]
    return [_aligned(row, columns, widths) for row in [heading, *cells]]


def fields(pairs: Iterable[tuple[str, Line | str]], *, indent: int = 2) -> list[Line]:
    """Names in one column, values in the other."""
    known = [(name, line(value) if isinstance(value, str) else value) for name, value in pairs]
    width = max((len(name) for name, _ in known), default=0)
    return [(Piece(" " * indent + f"{name:<{width}}  ", "dim"), *value) for name, value in known]


def bar(share: float, width: int, style: str) -> Line:
    """A filled bar; ``share`` from 0 to 1."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return line(Piece("█" * filled, style), Piece("░" * (width - filled), "dim"))


def _cell(value: Piece | str, column: Column) -> Piece:
    piece = Piece(value) if isinstance(value, str) else value
    return Piece(clip(printable(piece.text), column.max_width), piece.style)


def _aligned(row: Sequence[Piece], columns: Sequence[Column], widths: Sequence[int]) -> Line:
    pieces: list[Piece] = []
    for piece, column, width in zip(row, columns, widths, strict=True):
        padding = " " * (width - width_of(piece.text))
        pieces += [Piece(padding), piece] if column.is_right else [piece, Piece(padding)]
        pieces.append(Piece("  "))
    while pieces and not pieces[-1].text.strip():
        pieces.pop()
    return tuple(pieces)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
