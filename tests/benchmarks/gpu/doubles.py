"""A clock that measures nothing, a span that computes nearly nothing, and small shapes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from benchmarks.gpu.block_cases import DecodeStep
from benchmarks.gpu.cards import Shape
from benchmarks.gpu.case import Site
from benchmarks.gpu.pages import Rows
from benchmarks.timing import Work
from petalsd.types import BlockSpan

TINY = Shape("tiny", 2, 256, 256, num_heads=4, num_kv_heads=2, head_dim=64, bandwidth_share=0.5)
SITE = Site(torch.device("cpu"), torch.float16, num_sms=4, scale=64, samples=3)


class FakeClock:
    """Runs the work once and says how long it took: a second more with each work, or what ``script`` says."""

    def __init__(self) -> None:
        self.num_works = 0

    def seconds(self, work: Work, samples: int, *, is_replayed: bool = True) -> list[float]:
        work()
        self.num_works += 1
        return [1e-6 * self.num_works] * samples

    def num_kernels(self, work: Work) -> int:
        work()
        return 10


@dataclass
class AddingStates:
    hidden: torch.Tensor

    def enter(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden.clone()

    def leave(self, tokens: int) -> torch.Tensor:
        return self.hidden[:tokens].clone()


@dataclass
class AddingSpan:
    """Each block adds its number and one; ``computed`` are the blocks of each call."""

    span: BlockSpan
    computed: list[BlockSpan] = field(default_factory=list)

    def make_states(self, tokens: int) -> AddingStates:
        return AddingStates(torch.empty(tokens, TINY.hidden))

    def plan_decode(self, num_rows: int, kv: object, max_context: int) -> None:
        return None

    def compute(self, blocks: BlockSpan, states: AddingStates, *others: object) -> None:
        self.computed.append(blocks)
        for block in blocks:
            states.hidden += block + 1


def adding_step(span: AddingSpan, num_rows: int) -> DecodeStep:
    rows = Rows.draw(SITE, TINY, [64] * num_rows, len(span.span))
    return DecodeStep(span, rows.decode(), rows.kv, SITE.randn(num_rows, TINY.hidden), 64)
