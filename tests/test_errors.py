"""What errors show of the values that they are about."""

from __future__ import annotations

import pytest

from petalsd.errors import shortened


class Item:
    """Counts how many were written."""

    num_written = 0

    def __repr__(self) -> str:
        Item.num_written += 1
        return "item"


@pytest.mark.parametrize(
    "value", ["x" * 10**6, b"x" * 10**6, [Item()] * 10**6, (Item(),) * 10**6, {1: "x" * 10**6}]
)
def test_long_values_are_shown_shortened(value: object) -> None:
    """And what is not shown is not written: a million of them would hold up everybody."""
    Item.num_written = 0
    shown = shortened(value)
    assert len(shown) == 120 and shown.endswith("...")
    assert Item.num_written <= 120


def test_what_is_nested_too_deeply_is_named() -> None:
    """msgpack brings lists in a thousand lists; they would end in an error about the error."""
    value: list[object] = []
    for _ in range(200_000):
        value = [value]
    assert shortened({"a": value}) == "a dict nested too deeply to be shown"


@pytest.mark.parametrize("value", ["", "x" * 118, [1, 2], (None,), 5, {"a": b"b"}])
def test_short_values_are_shown_as_they_are(value: object) -> None:
    assert shortened(value) == repr(value)
