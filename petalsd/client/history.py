"""What a session must remember to be fed again to another server: hidden states and prompts, by position. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

import torch

from petalsd.errors import BadRequest
from petalsd.types import BlockSpan

_FIRST_CAPACITY_TOKENS = 64


class InputHistory:
    """The hidden states that entered one span so far, ``[B, length, M]`` in one growing buffer."""

    def __init__(self) -> None:
        self._states: torch.Tensor | None = None
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    @property
    def num_rows(self) -> int:
        """B, or 0 before the first ``append``."""
        return 0 if self._states is None else self._states.shape[0]

    def append(self, hidden: torch.Tensor) -> None:
        """Add ``[B, n, M]`` at the end; B and M are fixed by the first call, the dtype may widen."""
        end = self._length + hidden.shape[1]
        buffer = self._room_for(hidden, end)
        buffer[:, self._length : end] = hidden
        self._length = end

    def between(self, start: int, end: int) -> torch.Tensor:
        """The states of positions ``start`` to ``end - 1``, contiguous."""
        if self._states is None or not 0 <= start <= end <= self._length:
            raise IndexError(f"positions {start}:{end} of a history of {self._length}")
        return self._states[:, start:end].contiguous()

    def truncate(self, length: int) -> None:
        """Forget what came after the first ``length`` positions."""
        self._length = min(self._length, length)

    def reorder(self, hypo_ids: Sequence[int]) -> None:
        """Row j becomes old row ``hypo_ids[j]``, as the servers' caches do."""
        if self._states is not None:
            self._states = self._states[list(hypo_ids)]

    def _room_for(self, hidden: torch.Tensor, end: int) -> torch.Tensor:
        states = self._states
        if states is None:
            batch, _, hidden_size = hidden.shape
            states = hidden.new_empty(batch, max(end, _FIRST_CAPACITY_TOKENS), hidden_size)
        if end > states.shape[1]:
            longer = states.new_empty(states.shape[0], max(end, 2 * states.shape[1]), states.shape[2])
            longer[:, : self._length] = states[:, : self._length]
            states = longer
        if states.dtype != hidden.dtype:
            states = states.to(torch.promote_types(states.dtype, hidden.dtype))
        self._states = states
        return states


class PromptHistory:
    """The deep prompts of all steps so far, each with the position where its step began.

    ``first_block`` is the block that slice 0 of every prompt belongs to.
    """

    def __init__(self, first_block: int = 0) -> None:
        self._first_block = first_block
        self._entries: list[tuple[int, torch.Tensor]] = []

    def add(self, start: int, prompts: torch.Tensor) -> None:
        """Note ``[num_blocks, B or 1, prefix, M]``, added to positions ``start`` to ``start + prefix - 1``."""
        self._entries.append((start, prompts))

    def truncate(self, length: int) -> None:
        """Forget what was added from position ``length`` on."""
        kept = [(start, prompts) for start, prompts in self._entries if start < length]
        self._entries = [(start, prompts[:, :, : length - start]) for start, prompts in kept]

    def reorder(self, hypo_ids: Sequence[int]) -> None:
        """Row j becomes old row ``hypo_ids[j]``; prompts that all rows share stay."""
        rows = list(hypo_ids)
        self._entries = [(s, p if p.shape[1] == 1 else p[:, rows]) for s, p in self._entries]

    def starts(self) -> list[int]:
        """Where prompts begin, ascending: a replayed step must begin there too."""
        return [start for start, _ in self._entries]

    def between(self, start: int, end: int, blocks: BlockSpan) -> torch.Tensor | None:
        """What must go with a step over positions ``start:end`` through ``blocks``; None where nothing is added.

        ``start`` may lie inside a prompt; no other prompt may begin inside the step.

            prompt        |-----prefix-----|
            step               |-------------------|
            answer             |-----------|
        """
        for first, prompts in self._entries:
            begin, stop = start - first, min(end - first, prompts.shape[2])
            if 0 <= begin < stop:
                slices = prompts[blocks.start - self._first_block : blocks.end - self._first_block]
                return slices[:, :, begin:stop].contiguous()
        return None


class StepLog:
    """Where the session's steps began, and how positions may be cut into messages.

    Any cut gives the same numbers, unless the model's rotary embedding depends on how long a row is (dynamic,
    longrope): then steps that reach beyond ``whole_from`` positions must be sent as they came.
    """

    def __init__(self, whole_from: int | None = None) -> None:
        self._whole_from = whole_from
        self._starts: list[int] = []

    def add(self, start: int) -> None:
        """A step begins at ``start``, the end of all steps so far."""
        if not self._starts or self._starts[-1] < start:
            self._starts.append(start)

    def truncate(self, length: int) -> None:
        """Forget the steps from position ``length`` on."""
        del self._starts[bisect_left(self._starts, length) :]

    def cut(self, start: int, end: int, max_tokens: int, borders: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Cut ``start:end`` into messages of at most ``max_tokens`` (>= 1) that do not cross a border.

        Steps that must stay whole do, whatever their length. An empty range is one empty message: it still has to
        be answered.
        """
        if start == end:
            yield start, end
        whole_from = self._first_whole(end)
        while start < end:
            if start < whole_from:
                stop = min(start + max_tokens, whole_from, *(border for border in borders if border > start))
            else:
                stop = self._step_end(start, end)
            yield start, stop
            start = stop

    def _first_whole(self, end: int) -> int:
        """Where the first step begins that must stay whole, at most ``end``."""
        if self._whole_from is None or end <= self._whole_from:
            return end
        return self._starts[bisect_right(self._starts, self._whole_from) - 1]

    def _step_end(self, start: int, end: int) -> int:
        following = bisect_right(self._starts, start)
        return self._starts[following] if following < len(self._starts) else end


def check_prompts(prompts: torch.Tensor, hidden: torch.Tensor, num_blocks: int) -> None:
    """BadRequest unless ``prompts`` fit a step or pass over ``hidden`` ``[B, n, M]``."""
    batch, tokens, hidden_size = hidden.shape
    shape = tuple(prompts.shape)
    fits = len(shape) == 4 and shape[0] == num_blocks and shape[1] in (1, batch) and shape[3] == hidden_size
    if not fits or shape[2] > tokens:
        rule = f"prompts are [{num_blocks}, {batch} or 1, at most {tokens}, {hidden_size}]"
        raise BadRequest("prompts", shape, rule)
