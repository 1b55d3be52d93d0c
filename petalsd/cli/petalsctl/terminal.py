"""What is written where: plain lines, lines that are redrawn in place, colours on a terminal only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from petalsd.cli.petalsctl.text import Line, render

_HIDE_CURSOR = "\x1b[?25l"
_SHOW_CURSOR = "\x1b[?25h"
_CLEAR_TO_LINE_END = "\x1b[K"
_CLEAR_BELOW = "\x1b[J"
_UNBOUNDED = 1 << 16


class Terminal:
    """A stream for people. Elsewhere than on a terminal lines are neither coloured nor cut."""

    def __init__(self, stream: TextIO, *, may_colour: bool, environ: Mapping[str, str]) -> None:
        self._stream = stream
        self.is_terminal = stream.isatty() and environ.get("TERM") != "dumb"
        self.is_coloured = self.is_terminal and may_colour and not environ.get("NO_COLOR")
        self._drawn_lines = 0

    def show(self, lines: Sequence[Line]) -> None:
        """Write lines to stay; a frame that was drawn before is replaced by them."""
        width = self._width if self.is_terminal else _UNBOUNDED
        text = "".join(f"{row}\n" for row in self._render(lines, width, breaks_words=False))
        self._write(self._to_frame_start() + _CLEAR_BELOW * bool(self._drawn_lines) + text)

    def draw(self, lines: Sequence[Line]) -> None:
        """Replace the frame drawn before. No taller than the screen, where going up would miss its beginning."""
        # One column stays free: a full line would make some terminals wrap.
        drawn = self._render(lines, self._width - 1)[: max(1, self._height - 1)]
        body = "".join(f"{row}{_CLEAR_TO_LINE_END}\n" for row in drawn)
        self._write(self._to_frame_start() + body + _CLEAR_BELOW, len(drawn))

    def erase(self) -> None:
        """Take the frame away, and the ^C that a terminal echoes with it."""
        self._write(self._to_frame_start() + "\r" + _CLEAR_BELOW)

    @contextmanager
    def hidden_cursor(self) -> Iterator[None]:
        if not self.is_terminal:
            yield
            return
        self._write(_HIDE_CURSOR, self._drawn_lines)
        try:
            yield
        finally:
            self._write(_SHOW_CURSOR, self._drawn_lines)

    def _render(self, lines: Sequence[Line], width: int, *, breaks_words: bool = True) -> list[str]:
        shown = (
            render(line, width, is_coloured=self.is_coloured, breaks_words=breaks_words) for line in lines
        )
        return [row for rows in shown for row in rows]

    def leave(self) -> None:
        """Let the frame stay as it is; only the ^C that a terminal echoes goes."""
        self._write(f"\r{_CLEAR_BELOW}")

    def _to_frame_start(self) -> str:
        return f"\x1b[{self._drawn_lines}A\r" if self._drawn_lines else ""

    def _write(self, text: str, drawn_lines: int = 0) -> None:
        """``drawn_lines`` of it are a frame. Ctrl-C mostly comes after the bytes are out: it counts then too."""
        try:
            self._stream.write(text)
            self._stream.flush()
        finally:
            self._drawn_lines = drawn_lines

    @property
    def _width(self) -> int:
        return self._size().columns

    @property
    def _height(self) -> int:
        return self._size().lines

    def _size(self) -> os.terminal_size:
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            return shutil.get_terminal_size()
        return size if size.columns and size.lines else os.terminal_size((80, 24))
