"""The predictions: bytes and launches by hand, and the page that holds them."""

from __future__ import annotations

import pytest

from benchmarks.gpu.cards import CARDS, SHAPES, Card
from benchmarks.gpu.roofline import (
    GAP_S,
    MARKER,
    PAGE,
    Launch,
    Step,
    attention_launches,
    block_launches,
    limit_s,
    predict_s,
    weight_bytes,
    written,
)

SMALL, LARGE = SHAPES
H100 = next(card for card in CARDS if card.name.startswith("H100"))


@pytest.mark.parametrize(
    ("weights", "small", "large"),
    [("bfloat16", 436.2e6, 1711e6), ("int8", 218.1e6, 855.6e6), ("int4", 115.9e6, 454.6e6)],
)
def test_weights_of_a_block(weights: str, small: float, large: float) -> None:
    """218.1 and 855.6 million parameters; int4 has a scale of 16 bits for 64 of them."""
    for shape, expected in ((SMALL, small), (LARGE, large)):
        assert sum(weight_bytes(shape, weights).values()) == pytest.approx(expected, rel=1e-3)


def test_bytes_of_attention() -> None:
    """4096 bytes of keys and values for each token; parts of contexts are written and read again."""
    (whole,) = attention_launches(SMALL, Step(64), H100)
    assert whole.nbytes == 64 * 4096 * 4096 + 2 * 64 * 4096 * 2
    attention, combine = attention_launches(SMALL, Step(1), H100)
    parts = 16 * 32 * 130 * 4
    assert attention.nbytes == 4096 * 4096 + 4096 * 2 + parts
    assert combine.nbytes == parts + 4096 * 2


@pytest.mark.parametrize(("batch", "launches"), [(1, 10), (64, 9)])
def test_launches_of_a_block(batch: int, launches: int) -> None:
    """Ten at most, as the kernels promise; gaps count for each."""
    assert len(block_launches(SMALL, Step(batch), H100)) == launches
    idle = [Launch("nothing", "elementwise", 0.0)] * launches
    assert predict_s(idle, H100) == pytest.approx(launches * GAP_S)


def test_the_longer_of_memory_and_products() -> None:
    """A small peak makes the same launch bound by its products, in the prediction and in the limit."""
    launch = Launch("product", "product", nbytes=85e6, flops=1e9)
    fast, slow = Card("fast", 100, 1000, 1), Card("slow", 100, 0.1, 1)
    assert launch.seconds(fast) == pytest.approx(1e-3)
    assert launch.seconds(slow) == pytest.approx(1e-2)
    assert limit_s([launch], fast, 0.5) == pytest.approx(1.7e-3)
    assert limit_s([launch], slow, 0.5) == pytest.approx(2e-2)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_targets_can_be_met(card: Card) -> None:
    """A block that does what is predicted meets its target on every card, and the target is no slack one."""
    for shape in SHAPES:
        for batch in (1, 16, 64):
            launches = block_launches(shape, Step(batch), card)
            limit = limit_s(launches, card, shape.bandwidth_share)
            assert limit * 0.65 < predict_s(launches, card) < limit


def test_the_page_holds_the_tables() -> None:
    """`python -m benchmarks.gpu.roofline --write` writes them."""
    head, marker, tables = PAGE.read_text().partition(MARKER)
    assert head and marker
    assert tables.strip() == written().strip()
