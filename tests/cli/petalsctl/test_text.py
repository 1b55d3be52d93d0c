"""Numbers as people read them, and lines that fit a terminal."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from petalsd.cli.petalsctl import units
from petalsd.cli.petalsctl.text import Column, Line, Piece, clip, clip_middle, line, render, table, width_of


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.44, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"),
     (3600, "1 h"), (7500, "2 h 5 min"), (86_399.9, "1 d"), (273_600, "3 d 4 h"), (-1, "0 s"),
     (float("inf"), "for ever")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (59.6, "60 s"), (119, "119 s"), (7000, "117 min"), (9000, "2 h"), (9e5, "10 d")],
)
def test_short_durations(seconds: float, text: str) -> None:
    assert units.short_duration(seconds) == text


def test_sizes_and_rates() -> None:
    assert [units.size(value) for value in (0, 1023, 1536, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
    ]
    assert [units.rate(value) for value in (0.833, 12.44, 1234.5)] == ["0.83", "12.4", "1,234"]
    assert units.counted(1, "session") == "1 session"
    assert units.counted(12_000, "session") == "12,000 sessions"


def test_wide_characters_count_twice() -> None:
    assert width_of("漢字a") == 5
    assert clip("漢字漢字", 5) == "漢字…"
    assert clip("e\u0301" * 3, 3) == "e\u0301" * 3
    assert clip_middle("12D3KooWabcdef", 9) == "12D3…cdef"


def test_words_stay_whole_and_continuations_hang() -> None:
    shown = render(line(Piece("  name  ", "dim"), "one two three", hang=8), 15, is_coloured=False)
    assert shown == ["  name  one two", "        three"]
    assert render(line("abcdefghij"), 4, is_coloured=False) == ["abcd", "efgh", "ij"]
    whole = render(line("  name  ", "abcdefghijk lm", hang=8), 15, is_coloured=False, breaks_words=False)
    assert whole == ["  name  abcdefghijk", "        lm"]
    assert render(line("ab ", Piece("cd", "good")), 80, is_coloured=True) == ["ab \x1b[32mcd\x1b[0m"]


@given(st.lists(st.text(max_size=30), max_size=4), st.integers(1, 40), st.integers(0, 10))
@example(["00000\U00020000"], 2, 0)  # the last part of a broken word has room for half of it
@example(["00000\U00020000"], 2, 1)  # and beside the indentation there is only half of the room
def test_no_line_is_wider_than_the_terminal(texts: list[str], width: int, hang: int) -> None:
    """And nothing but spaces is lost, unless a wide character meets a terminal of one column."""
    hang = min(hang, width - 1)
    shown = render(line(*texts, hang=hang), width, is_coloured=False)
    assert all(width_of(row) <= max(width, 2) for row in shown)
    kept = "".join("".join(shown).split())
    assert kept == "".join(
        character if character.isprintable() else "\ufffd" for character in "".join(texts)
    ).replace(" ", "")


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=5), st.integers(1, 40))
def test_rows_of_tables_are_cut(rows: list[tuple[str, str]], width: int) -> None:
    columns = [Column("name"), Column("number", is_right=True)]
    for row in table(columns, rows):
        assert isinstance(row, Line)
        (shown,) = render(row, width, is_coloured=False)
        assert width_of(shown) <= width
