"""Walks a batch through the served blocks, sessions of different sub-ranges together where they overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from petalsd.engine.batch import BatchItem, step_ends
from petalsd.engine.captures import Captures
from petalsd.engine.graphed_span import GraphedSpan
from petalsd.engine.staging import Part, Staging
from petalsd.kvcache.pool import KVPool
from petalsd.models.contract import Angles
from petalsd.models.paged_span import BlockByBlock, CosSin, PagedSpan
from petalsd.ops.ragged import RaggedBatch
from petalsd.types import BlockSpan


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks through which the same items run; ``items`` are indices into the batch's items, ascending.

    ``adapter`` is that of all of them.
    """

    blocks: BlockSpan
    items: tuple[int, ...]
    adapter: str | None = None


def split_segments(spans: Sequence[BlockSpan], adapters: Sequence[str | None]) -> list[Segment]:
    """Cut the spans of a batch's items where one of them starts or ends; ascending, gaps left out.

    What has different adapters goes through the same blocks one after the other.

    >>> split_segments([BlockSpan(0, 4), BlockSpan(2, 6)], [None, None])
    0:2 with item 0, 2:4 with items 0 and 1, 4:6 with item 1
    """
    first, adapter = spans[0], adapters[0]
    # Most servers' sessions use all that is served.
    if all(span == first for span in spans[1:]) and all(one == adapter for one in adapters[1:]):
        return [Segment(first, tuple(range(len(spans))), adapter)]
    cuts = sorted({span.start for span in spans} | {span.end for span in spans})
    segments = []
    for start, end in pairwise(cuts):
        active: dict[str | None, list[int]] = {}
        for i, span in enumerate(spans):
            if span.start <= start and end <= span.end:
                active.setdefault(adapters[i], []).append(i)
        blocks = BlockSpan(start, end)
        segments += [Segment(blocks, tuple(items), name) for name, items in active.items()]
    return segments


class SpanRunner:
    """Computes batches over the blocks of one loaded span. Lives on the engine thread.

    ``adapted``: the same blocks with each of their adapters.
    """

    def __init__(
        self,
        span: PagedSpan,
        pool: KVPool,
        rope: Angles,
        staging: Staging,
        adapted: Mapping[str, PagedSpan] | None = None,
    ) -> None:
        self._span = span
        self._adapted = adapted or {}
        self._pool = pool
        self._rope = rope
        self._staging = staging

    @property
    def captures(self) -> Captures | None:
        """The captured steps; None where nothing is captured."""
        return self._span.captures if isinstance(self._span, GraphedSpan) else None

    def take_over(self, before: SpanRunner) -> None:
        """Go on in the place of ``before``, over the same pages, with what it has captured of the same blocks."""
        if self.captures is not None and before.captures is not None:
            self.captures.take_over(before.captures)

    def release(self) -> None:
        """Let go of the blocks, their graphs included; nothing is run any more."""
        self._span, self._adapted = BlockByBlock({}), {}

    def run(self, items: Sequence[BatchItem]) -> list[torch.Tensor]:
        """Compute the items; one ``[rows * tokens, M]`` CPU tensor in the model's dtype for each.

        Writes the keys and values of the new tokens. Raises what computing raises; running the same items again
        then is safe, because the same places are written.
        """
        if len(items) == 1:
            return self._run_ordered(items)
        # Kernels take single tokens together when they come first.
        order = sorted(range(len(items)), key=lambda index: items[index].tokens > 1)
        answers = self._run_ordered([items[index] for index in order])
        by_index = dict(zip(order, answers, strict=True))
        return [by_index[index] for index in range(len(items))]

    def _run_ordered(self, items: Sequence[BatchItem]) -> list[torch.Tensor]:
        segments = split_segments([item.span for item in items], [item.adapter for item in items])
        parts = [segment.items for segment in segments if len(segment.items) < len(items)]
        batch, staged_parts = self._staging.build(items, self._pool, parts)
        seq_lens = step_ends(items) if self._rope.is_length_dependent else None
        cos_sin = self._rope.cos_sin(batch.ragged.positions, seq_lens, batch.ragged.longest)
        hidden = self._staging.bring([item.hidden for item in items])
        if any(item.prompts is not None for item in items):
            hidden = hidden.clone()  # prompts are added in place, and these may be the client's own states
        remaining = iter(staged_parts)
        for segment in segments:
            if len(segment.items) == len(items):
                hidden = self._walk(segment, items, hidden, batch.ragged, cos_sin)
            else:
                active = [items[index] for index in segment.items]
                hidden = self._walk_part(segment, active, hidden, next(remaining), cos_sin)
        answer = self._staging.fetch(hidden)
        return [answer[tokens] for tokens in batch.item_tokens] if len(items) > 1 else [answer]

    def _walk_part(
        self,
        segment: Segment,
        items: Sequence[BatchItem],
        hidden: torch.Tensor,
        part: Part,
        cos_sin: CosSin,
    ) -> torch.Tensor:
        """Take a segment's items through its blocks; the states of the others in ``hidden`` pass unchanged."""
        chosen = tuple(of_all[part.tokens] for of_all in cos_sin)
        states = self._walk(segment, items, hidden[part.tokens], part.ragged, chosen)
        return hidden.index_copy(0, part.tokens, states)

    def _walk(
        self,
        segment: Segment,
        items: Sequence[BatchItem],
        hidden: torch.Tensor,
        batch: RaggedBatch,
        cos_sin: CosSin,
    ) -> torch.Tensor:
        """``hidden`` ``[T, M]`` of the items through the blocks; it may be written to when there are prompts."""
        prompts, blocks = place_prompts(items), segment.blocks
        span = self._span if segment.adapter is None else self._adapted[segment.adapter]
        # A prompt is added between two blocks, so the walk stops there.
        runs = [BlockSpan(block, block + 1) for block in blocks] if prompts else [blocks]
        for run in runs:
            for prompt in prompts:
                prompt.add_to(hidden, run.start)
            hidden = span.forward_paged(run, hidden, self._pool.kv, batch, cos_sin)
        return hidden


@dataclass(frozen=True, slots=True)
class PlacedPrompts:
    """The prompts of the item whose ``rows`` rows are the batch's ``tokens``; slice 0 is ``first_block``'s."""

    tokens: slice
    rows: int
    first_block: int
    prompts: torch.Tensor

    def add_to(self, hidden: torch.Tensor, block: int) -> None:
        """Add the block's slice to the first tokens of each row, in place in ``hidden`` ``[T, M]``."""
        states = hidden[self.tokens].view(self.rows, -1, hidden.shape[1])
        prompt = self.prompts[block - self.first_block]
        states[:, : prompt.shape[1]] += prompt


def place_prompts(items: Sequence[BatchItem]) -> list[PlacedPrompts]:
    """Find the tokens of the items that bring prompts, among those of all ``items`` concatenated."""
    placed = []
    first = 0
    for item in items:
        tokens = slice(first, first := first + item.rows * item.tokens)
        if item.prompts is not None:
            placed.append(PlacedPrompts(tokens, item.rows, item.span.start, item.prompts))
    return placed
