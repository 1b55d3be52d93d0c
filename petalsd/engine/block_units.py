"""Forward and backward through one block without a cache, in units of some rows, or of a part of one row.

Rows are independent of each other, so a unit takes some of them. A row that is too long for a unit is cut. Forward
its parts follow each other, each attending to the keys and values of those before. Backward they go from last to
first: when a part's turn comes, all that attend to its keys and values have left their gradients there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch

from petalsd.engine.iteration_cost import AttentionShare, Work
from petalsd.models.block import KeysValues
from petalsd.models.paged_span import CosSin

LEAST_PART_TOKENS = 32  # a part is no smaller: below that reading the weights is most of the work


class DenseBlock(Protocol):
    """A block without a cache; ``TransformerBlock`` is the contract."""

    def forward_dense(self, hidden: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class PartwiseBlock(DenseBlock, Protocol):
    """One whose rows can be cut; the same contract. Rows of other blocks go whole."""

    def dense_cos_sin(self, num_tokens: int) -> CosSin: ...

    def forward_part(
        self, hidden: torch.Tensor, cos_sin: CosSin, past: KeysValues | None = None
    ) -> tuple[torch.Tensor, KeysValues]: ...

    def project_part(
        self, hidden: torch.Tensor, cos_sin: CosSin, past: KeysValues | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


class PassUnit(NamedTuple):
    """What was done just now.

    work      for the cost model; None where it was of another kind than the other units
    is_pause  only results are held, so another pass may go first
    """

    work: Work | None
    is_pause: bool = False


Units: TypeAlias = Generator[PassUnit, None, None]
ComputeRows: TypeAlias = Callable[[slice], torch.Tensor]
ComputeRow: TypeAlias = Callable[[PartwiseBlock, slice], Units]


@dataclass(slots=True)
class Pace:
    """The size of the next units, in ``Work.tokens``; ``attention`` says how those count."""

    attention: AttentionShare
    tokens: float

    def rows(self, num_tokens: int) -> int:
        """How many rows of so many tokens make a unit; may be 0."""
        return int(self.tokens / max(1.0, self.attention.work(1, num_tokens, 0, 1).tokens))

    def part(self, first: int, num_tokens: int) -> slice:
        """The part that follows the ``first`` tokens of a row of ``num_tokens``."""
        tokens = self.attention.tokens_within(self.tokens, 1, first, 1)
        return slice(first, min(num_tokens, first + max(tokens, LEAST_PART_TOKENS)))

    def unit(self, rows: int, tokens: int, context: int = 0) -> PassUnit:
        """What was done, as the cost model counts it."""
        return PassUnit(Work(1.0, self.attention.work(rows, tokens, context, 1).tokens))


def forward_block(block: DenseBlock, entering: torch.Tensor, leaving: torch.Tensor, pace: Pace) -> Units:
    """Fill ``leaving`` with what the block makes of ``entering``, both ``[B, n, M]``."""

    def compute(rows: slice) -> torch.Tensor:
        with torch.no_grad():
            return block.forward_dense(entering[rows])

    def compute_row(partwise: PartwiseBlock, row: slice) -> Units:
        return _forward_row(partwise, entering[row], leaving[row], pace)

    return _by_rows(block, leaving, pace, compute, compute_row)


def backward_block(
    block: DenseBlock,
    entering: torch.Tensor,
    grad_leaving: torch.Tensor,
    grad_entering: torch.Tensor,
    pace: Pace,
) -> Units:
    """Fill ``grad_entering``, computing the block again with a graph; all ``[B, n, M]``."""

    def compute(rows: slice) -> torch.Tensor:
        with torch.enable_grad():
            states = _leaf(entering[rows])
            (grad,) = torch.autograd.grad(block.forward_dense(states), states, grad_leaving[rows])
        return grad

    def compute_row(partwise: PartwiseBlock, row: slice) -> Units:
        return _backward_row(partwise, entering[row], grad_leaving[row], grad_entering[row], pace)

    return _by_rows(block, grad_entering, pace, compute, compute_row)


def _by_rows(
    block: DenseBlock, out: torch.Tensor, pace: Pace, compute: ComputeRows, compute_row: ComputeRow
) -> Units:
    """Fill ``out`` row after row: as many as a unit takes, or parts of one."""
    num_rows, num_tokens, _ = out.shape
    first = 0
    while first < num_rows:
        count = pace.rows(num_tokens)
        if count == 0 and num_tokens > LEAST_PART_TOKENS and isinstance(block, PartwiseBlock):
            yield from compute_row(block, slice(first, first + 1))
            first += 1
            continue
        rows = slice(first, min(num_rows, first + max(count, 1)))
        out[rows] = compute(rows)
        yield pace.unit(rows.stop - first, num_tokens)
        first = rows.stop


def _of_part(cos_sin: CosSin, part: slice) -> CosSin:
    return tuple(angles[part] for angles in cos_sin)


def _forward_row(block: PartwiseBlock, entering: torch.Tensor, leaving: torch.Tensor, pace: Pace) -> Units:
    num_tokens = entering.shape[1]
    cos_sin = block.dense_cos_sin(num_tokens)
    past = None
    first = 0
    while first < num_tokens:
        part = pace.part(first, num_tokens)
        with torch.no_grad():
            leaving[:, part], past = block.forward_part(entering[:, part], _of_part(cos_sin, part), past)
        yield pace.unit(1, part.stop - first, first)
        first = part.stop


def _backward_row(
    block: PartwiseBlock,
    entering: torch.Tensor,
    grad_leaving: torch.Tensor,
    grad_entering: torch.Tensor,
    pace: Pace,
) -> Units:
    num_tokens = entering.shape[1]
    cos_sin = block.dense_cos_sin(num_tokens)
    parts: list[slice] = []
    past: KeysValues | None = None
    while not parts or parts[-1].stop < num_tokens:
        part = pace.part(parts[-1].stop if parts else 0, num_tokens)
        with torch.no_grad():
            _, k, v = block.project_part(entering[:, part], _of_part(cos_sin, part), past)
        past = k, v
        parts.append(part)
        yield PassUnit(None)
    grad_keys, grad_values = torch.zeros_like(k), torch.zeros_like(v)
    for part in reversed(parts):
        with torch.enable_grad():
            before = _leaf(k[:, :, : part.start]), _leaf(v[:, :, : part.start])
            states = _leaf(entering[:, part])
            left, keys_values = block.forward_part(states, _of_part(cos_sin, part), before)
            grad_entering[:, part], grad_keys, grad_values = torch.autograd.grad(
                (left, *keys_values), (states, *before), (grad_leaving[:, part], grad_keys, grad_values)
            )
        yield pace.unit(1, part.stop - part.start, part.start)


def _leaf(states: torch.Tensor) -> torch.Tensor:
    return states.detach().requires_grad_()
