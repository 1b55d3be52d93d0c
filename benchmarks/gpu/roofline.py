"""What a decode step through a block should take on a card: the bytes it must move, the launches between them.

A launch takes as long as its bytes at the share of the memory's bandwidth that good kernels reach, or as its
products at the card's peak, whichever is longer; from one launch of a graph to the next passes a gap. These are
predictions and no claims.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.gpu.cards import (
    ATTENTION_CONTEXT,
    ATTENTION_ROWS,
    ATTENTION_SHARE,
    CARDS,
    SHAPES,
    Card,
    Shape,
)
from petalsd.ops.decode_attention import MOST_COMBINED, num_splits

Kind = Literal["product", "attention", "elementwise"]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
MARKER = "<!-- The rest is written by `python -m benchmarks.gpu.roofline --write`. -->\n"

# Shares of the bandwidth that the best kernels of each kind are known to reach.
ETA: dict[Kind, float] = {"product": 0.85, "attention": 0.8, "elementwise": 0.85}
GAP_S = 1.25e-6
BITS = {"bfloat16": 16.0, "int8": 8.0, "int4": 4.0}
GROUP_INPUTS = 64  # of an int4 weight share a scale
BATCHES = (1, 16, 64)
_VALUE_BYTES = 2
_PARTIAL_BYTES = 4
_TILE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step: one new token of ``batch`` rows each, which attends to ``context`` tokens."""

    batch: int
    context: int = ATTENTION_CONTEXT
    weights: str = "bfloat16"


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel: what it moves to and from memory at least, and the operations of its products."""

    name: str
    kind: Kind
    nbytes: float
    flops: float = 0.0

    def seconds(self, card: Card) -> float:
        return max(self.nbytes / (ETA[self.kind] * card.gb_per_s * 1e9), self.flops / (card.tflops * 1e12))


def splits_of(shape: Shape, step: Step, card: Card) -> int:
    """Into how many parts contexts are cut."""
    return num_splits(step.batch, shape.num_kv_heads, card.num_sms, -(-step.context // _TILE_TOKENS) + 1)


def weight_bytes(shape: Shape, weights: str) -> dict[str, float]:
    """Of each product's weight, with the scales of its format: one for each output, or for 64 inputs of it."""
    found = {}
    for name, (num_out, num_in) in shape.projections.items():
        scales = {"int8": num_out, "int4": num_out * num_in // GROUP_INPUTS}.get(weights, 0)
        found[name] = num_out * num_in * BITS[weights] / 8 + scales * _VALUE_BYTES
    return found


def attention_launches(shape: Shape, step: Step, card: Card) -> list[Launch]:
    """One, or two where contexts are cut into many parts."""
    q_bytes = step.batch * shape.num_heads * shape.head_dim * _VALUE_BYTES
    kv_bytes = step.batch * step.context * shape.kv_token_bytes
    flops = 4.0 * step.batch * step.context * shape.num_heads * shape.head_dim
    splits = splits_of(shape, step, card)
    if splits == 1:
        return [Launch("decode attention", "attention", kv_bytes + 2 * q_bytes, flops)]
    parts = splits * step.batch * shape.num_heads * (shape.head_dim + 2) * _PARTIAL_BYTES
    if splits <= MOST_COMBINED:
        return [Launch("decode attention", "attention", kv_bytes + 2 * q_bytes + 2 * parts, flops)]
    return [
        Launch("decode attention", "attention", kv_bytes + q_bytes + parts, flops),
        Launch("combine", "elementwise", parts + q_bytes),
    ]


def block_launches(shape: Shape, step: Step, card: Card) -> list[Launch]:
    """Of one block, in their order: ten, or nine where contexts are not cut."""
    weights = weight_bytes(shape, step.weights)

    def product(name: str) -> Launch:
        num_out, num_in = shape.projections[name]
        states = step.batch * (num_out + num_in) * _VALUE_BYTES
        return Launch(name, "product", weights[name] + states, 2.0 * step.batch * num_out * num_in)

    def moved(name: str, values: int) -> Launch:
        return Launch(name, "elementwise", step.batch * values * _VALUE_BYTES)

    norm_values = 4 * shape.hidden  # reads delta and residual, writes residual and the normed states
    qkv_values = shape.projections["qkv"][0]
    return [
        moved("add norm", norm_values), product("qkv"), moved("rope, KV write", 2 * qkv_values),
        *attention_launches(shape, step, card), product("output"),
        moved("add norm", norm_values), product("gate_up"), moved("gated activation", 3 * shape.inner),
        product("down"),
    ]  # fmt: skip


def predict_s(launches: Sequence[Launch], card: Card) -> float:
    """Seconds that these take one after the other, as nodes of a graph."""
    return sum(launch.seconds(card) for launch in launches) + len(launches) * GAP_S


def limit_s(launches: Sequence[Launch], card: Card, share: float) -> float:
    """What a measurement may take at most: the card's own bound for the bytes and products, over ``share``."""
    nbytes, flops = sum(one.nbytes for one in launches), sum(one.flops for one in launches)
    return max(nbytes / (card.gb_per_s * 1e9), flops / (card.tflops * 1e12)) / share


def block_table(shape: Shape) -> Iterator[str]:
    """Markdown: predicted microseconds of a block, and what a measurement has to stay below."""
    names = " | ".join(card.name for card in CARDS)
    yield f"| weights | batch | MB | launches | {names} |"
    yield "|---|---|---|---|" + "---|" * len(CARDS)
    for weights in BITS:
        for batch in BATCHES:
            step = Step(batch, weights=weights)
            of_cards = [block_launches(shape, step, card) for card in CARDS]
            cells = _cells(of_cards, shape.bandwidth_share)
            nbytes = sum(launch.nbytes for launch in of_cards[-1])
            counts = sorted({len(launches) for launches in of_cards})
            count = "–".join(map(str, counts))
            yield f"| {weights} | {batch} | {nbytes / 1e6:.0f} | {count} | {' | '.join(cells)} |"


def attention_table(shape: Shape) -> Iterator[str]:
    """Markdown: the same of decode attention alone."""
    names = " | ".join(card.name for card in CARDS)
    yield f"| batch | MB | {names} |"
    yield "|---|---|" + "---|" * len(CARDS)
    for batch in ATTENTION_ROWS:
        of_cards = [attention_launches(shape, Step(batch), card) for card in CARDS]
        cells = _cells(of_cards, ATTENTION_SHARE)
        nbytes = sum(launch.nbytes for launch in of_cards[-1])
        yield f"| {batch} | {nbytes / 1e6:.0f} | {' | '.join(cells)} |"


def _cells(of_cards: Sequence[Sequence[Launch]], share: float) -> list[str]:
    """Microseconds on each card: predicted, and at most."""
    seconds = [
        (predict_s(launches, card), limit_s(launches, card, share))
        for card, launches in zip(CARDS, of_cards, strict=True)
    ]
    return [f"{predicted * 1e6:.0f} / {limit * 1e6:.0f}" for predicted, limit in seconds]


def span_table() -> Iterator[str]:
    """Markdown: milliseconds of a step through all blocks of a model, whether or not they fit one card."""
    names = " | ".join(card.name for card in CARDS)
    yield f"| model | weights | batch | {names} |"
    yield "|---|---|---|" + "---|" * len(CARDS)
    for shape in SHAPES:
        for weights in BITS:
            for batch in BATCHES:
                step = Step(batch, weights=weights)
                cells = [
                    f"{shape.num_blocks * predict_s(block_launches(shape, step, card), card) * 1e3:.1f}"
                    for card in CARDS
                ]
                yield f"| {shape.name}, {shape.num_blocks} blocks | {weights} | {batch} | {' | '.join(cells)} |"


def written() -> str:
    """The part of docs/gpu.md that follows the marker."""
    parts = []
    for shape in SHAPES:
        share = f"{shape.bandwidth_share:.0%}".replace("%", " %")
        parts += [
            f"### A block of {shape.name}: at least {share} of the bandwidth",
            "",
            *block_table(shape),
            "",
        ]
        parts += [
            f"Decode attention alone, at least {ATTENTION_SHARE * 100:.0f} %:",
            "",
            *attention_table(shape),
            "",
        ]
    return "\n".join([*parts, "### All blocks, predicted milliseconds", "", *span_table(), ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.roofline", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace the tables of {PAGE.name}")
    if parser.parse_args().write:
        head, marker, _ = PAGE.read_text().partition(MARKER)
        PAGE.write_text(f"{head}{marker}\n{written()}")
    else:
        print(written())


if __name__ == "__main__":
    main()
