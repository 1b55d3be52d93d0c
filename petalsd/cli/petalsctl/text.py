"""Lines of styled text and tables of them; what a line may hold is decided here.

Names, addresses and reasons in a document may come from strangers in the swarm: whatever is not printable is
replaced, so that nobody's name can drive the reader's terminal.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ELLIPSIS = "…"
_WORDS = re.compile(
    r"\s*\S+\s*$|\s*\S+|\s+"
)  # a word takes the spaces before it, the last one also those behind
_INDENT = 2  # of what stands below another line
_WIDEST = 2  # columns of the widest character
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


@dataclass(frozen=True, slots=True)
class Line:
    """hang   columns that its continuations are indented by, where it does not fit
    is_row  part of a table: cut off instead
    """

    pieces: tuple[Piece, ...] = ()
    hang: int = 0
    is_row: bool = False


EMPTY = Line()


def line(*parts: Piece | str, hang: int = 0) -> Line:
    return Line(tuple(Piece(part) if isinstance(part, str) else part for part in parts), hang)


def advice(text: str, indent: int = _INDENT) -> Line:
    """What to do, below the line that says why."""
    return line(" " * indent + text, hang=indent)


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


def render(content: Line, width: int, *, is_coloured: bool, breaks_words: bool = True) -> list[str]:
    """The line as the terminal gets it, in lines not wider than ``width``; no line ends.

    Unless it ``breaks_words``, those that are longer than a line stay whole: the terminal goes on in its next one,
    and knows that it is the same word when somebody copies it.
    """
    pieces = [Piece(printable(piece.text), piece.style) for piece in content.pieces]
    rows = [_cut(pieces, width)] if content.is_row else _wrap(pieces, width, content.hang, breaks_words)
    return ["".join(_styled(piece, is_coloured) for piece in _joined(row)).rstrip() for row in rows]


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


def fields(pairs: Iterable[tuple[str, Line | str]]) -> list[Line]:
    """Names in one column, values in the other."""
    known = [(name, line(value) if isinstance(value, str) else value) for name, value in pairs]
    width = max((len(name) for name, _ in known), default=0)
    hang = _INDENT + width + 2
    return [
        line(Piece(f"{'':{_INDENT}}{name:<{width}}  ", "dim"), *value.pieces, hang=hang)
        for name, value in known
    ]


def bar(share: float, width: int, style: str) -> tuple[Piece, ...]:
    """A filled bar; ``share`` from 0 to 1."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return Piece("█" * filled, style), Piece("░" * (width - filled), "dim")


def _styled(piece: Piece, is_coloured: bool) -> str:
    codes = _STYLES[piece.style] if is_coloured and piece.text else ""
    return f"\x1b[{codes}m{piece.text}\x1b[0m" if codes else piece.text


def _joined(pieces: Sequence[Piece]) -> Iterable[Piece]:
    """Neighbours of one style as one, so that the style is switched once."""
    for style, group in itertools.groupby(pieces, key=lambda piece: piece.style):
        yield Piece("".join(piece.text for piece in group), style)


def _cut(pieces: Sequence[Piece], width: int) -> list[Piece]:
    kept: list[Piece] = []
    left = width
    for piece in pieces:
        if left <= 0:
            break
        kept.append(Piece(clip(piece.text, left), piece.style))
        left -= width_of(kept[-1].text)
    return kept


def _wrap(pieces: Sequence[Piece], width: int, hang: int, breaks_words: bool) -> list[list[Piece]]:
    """Breaks at spaces, and a word longer than a line anywhere."""
    hang = max(min(hang, width - _WIDEST), 0)  # beside the indentation every character must find room
    rows: list[list[Piece]] = [[]]
    left = width
    for piece in pieces:
        for word in _WORDS.findall(piece.text):
            if width_of(word.rstrip()) > left and left < width - hang:
                rows.append([Piece(" " * hang)])
                left = width - hang
                word = word.lstrip()
            for index, part in enumerate(_parts(word, left, width - hang) if breaks_words else [word]):
                if index and part.strip():
                    rows.append([Piece(" " * hang)])
                    left = width - hang
                rows[-1].append(Piece(part, piece.style))
                left -= width_of(part)
    return rows


def _parts(word: str, first: int, following: int) -> Iterable[str]:
    """``word`` in pieces, one for each row: of at most ``first`` columns, then ``following``."""
    if width_of(word.rstrip()) <= first:
        yield word
        return
    room = max(first, 1)
    start = used = 0
    for index, character in enumerate(word):
        if used + _columns(character) > room and index > start:
            yield word[start:index]
            start, used, room = index, 0, max(following, 1)
        used += _columns(character)
    yield word[start:]


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
    return Line(tuple(pieces), is_row=True)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return _WIDEST if unicodedata.east_asian_width(character) in "WF" else 1
