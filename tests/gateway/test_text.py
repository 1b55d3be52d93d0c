"""Text from tokens, and where it stops."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalsd.gateway.text import Detokenizer, StopStrings


def decode_bytes(ids: Sequence[int]) -> str:
    """A token is a byte, as in the vocabularies that fall back to bytes."""
    return bytes(ids).decode(errors="replace")


def decode_words(ids: Sequence[int]) -> str:
    """As sentencepiece does: a space stands before each word but the first."""
    return " ".join(f"w{index}" for index in ids)


def written(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.add(token) for token in ids), detokenizer.end()]


@given(st.text())
def test_bytes_become_whole_characters(text: str) -> None:
    """None is written in parts, and none is lost."""
    try:
        tokens = text.encode()
    except UnicodeEncodeError:
        return  # half of a surrogate pair is no text
    pieces = written(Detokenizer(decode_bytes), list(tokens))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_spaces_that_depend_on_the_word_before() -> None:
    assert written(Detokenizer(decode_words), [3, 1, 4]) == ["w3", " w1", " w4", ""]


def test_bytes_that_never_become_a_character_do_not_wait_for_ever() -> None:
    """Nor does what comes after them."""
    pieces = written(Detokenizer(decode_bytes), [0xFF] * 12 + list(b"ok"))
    assert "".join(pieces).endswith("ok")
    assert pieces[4] != ""


def test_what_is_unfinished_at_the_end_is_written() -> None:
    assert written(Detokenizer(decode_bytes), list("ä".encode())[:1]) == ["", "\ufffd"]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["one two"], "one two"),
        (["one END two"], "one "),
        (["one E", "N", "D two"], "one "),
        (["one E", "N", "otes"], "one ENotes"),
        (["EEND"], "E"),
        (["one EN"], "one EN"),
        (["a", "#", "#", "#"], "a"),
        (["a##b#", "#c"], "a##b##c"),
        (["", "END"], ""),
    ],
)
def test_text_goes_on_to_the_first_stop_string(pieces: list[str], expected: str) -> None:
    """Also to one that comes in parts, of which none has been written."""
    stops = StopStrings(["END", "###"])
    passed = [stops.add(piece) for piece in pieces]
    assert "".join(passed) + stops.end() == expected
    assert stops.is_found == ("".join(pieces) != expected)
    assert all("END"[:length] != text[-length:] for text in passed[:-1] for length in (1, 2) if text)


@given(st.lists(st.text("ab#", max_size=3)), st.lists(st.text("ab#", min_size=1, max_size=3), max_size=3))
def test_it_never_matters_how_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    places = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    matcher = StopStrings(stops)
    result = "".join(matcher.add(piece) for piece in pieces) + matcher.end()
    assert result == (text[: min(places)[1]] if places else text)


def test_nothing_waits_without_stop_strings() -> None:
    assert StopStrings([]).add("anything") == "anything"
