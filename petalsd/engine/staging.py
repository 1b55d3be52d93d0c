"""What a batch brings to its device and back: one copy of integers, one of hidden states, one of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from petalsd.engine.batch import (
    BatchItem,
    ItemBatch,
    build_batch,
    index_decode,
    index_tokens,
    item_bounds,
    row_shapes,
    select_items,
    selected_tokens,
)
from petalsd.kvcache.pool import KVPool
from petalsd.ops.decode_batch import (
    DecodeLayout,
    RowFields,
    bucket_of,
    num_leading_decodes,
    pad_rows,
    round_up,
)
from petalsd.ops.ragged import RaggedBatch


@dataclass(slots=True)
class Part:
    """Some items of a batch: their own ragged batch, and which tokens of the whole they are, ``[T']`` int64."""

    ragged: RaggedBatch
    tokens: torch.Tensor


class Staging(Protocol):
    """For one device, on the engine thread. Items with one token in each row should come first."""

    def build(
        self, items: Sequence[BatchItem], pool: KVPool, parts: Sequence[Sequence[int]]
    ) -> tuple[ItemBatch, list[Part]]:
        """The batch of all items, and those of ``parts``, indices into ``items``, on the device.

        The pool's copies must have been applied.
        """

    def bring(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """``[T, M]`` on the device of all these states on the CPU, ``[n, M]`` each. May be one of them itself."""

    def fetch(self, hidden: torch.Tensor) -> torch.Tensor:
        """The states ``[T, M]`` on the CPU, contiguous, once they are computed. May be ``hidden`` itself."""


class InPlace:
    """On the CPU everything is where it is needed."""

    def build(
        self, items: Sequence[BatchItem], pool: KVPool, parts: Sequence[Sequence[int]]
    ) -> tuple[ItemBatch, list[Part]]:
        batch = build_batch(items, pool)
        return batch, [Part(*select_items(batch, part)) for part in parts]

    def bring(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        return hidden[0] if len(hidden) == 1 else torch.cat(list(hidden))

    def fetch(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.contiguous()


class Staged:
    """For a device with memory of its own: through pinned memory, without waiting for what else it does.

    Integers are int32. Batches of single tokens of up to ``DECODE_BUCKETS[-1]`` rows, with at most ``max_runs``
    runs each (a multiple of 16), come packed as captured graphs read them (``KernelRows.packed``). Also works on
    a CPU, where memory is not pinned and there is nothing to wait for.
    """

    def __init__(self, device: torch.device, max_runs: int) -> None:
        self._device = device
        self._max_runs = max_runs
        self._is_pinned = device.type == "cuda"

    def build(
        self, items: Sequence[BatchItem], pool: KVPool, parts: Sequence[Sequence[int]]
    ) -> tuple[ItemBatch, list[Part]]:
        groups = [items, *([items[index] for index in part] for part in parts)]
        layouts = [_Layout.of(group, pool.kv.page_tokens, self._max_runs) for group in groups]
        bounds = item_bounds(items)
        tokens = [selected_tokens(bounds[0], part) for part in parts]
        sizes = [*(layout.num_elements for layout in layouts), *(round_up(len(part)) for part in tokens)]
        host = self._host_memory((sum(sizes),), torch.int32)
        pieces = torch.split(host, sizes)
        for memory, layout in zip(pieces[: len(layouts)], layouts, strict=True):
            layout.fill(memory, pool)
        for memory, part in zip(pieces[len(layouts) :], tokens, strict=True):
            memory.numpy()[: len(part)] = part
        pieces = torch.split(host.to(self._device, non_blocking=True), sizes)
        whole, *others = (
            layout.ragged(memory) for layout, memory in zip(layouts, pieces[: len(layouts)], strict=True)
        )
        chosen = (
            memory[: len(part)].long() for memory, part in zip(pieces[len(layouts) :], tokens, strict=True)
        )
        return ItemBatch(whole, *bounds), [Part(*pair) for pair in zip(others, chosen, strict=True)]

    def bring(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        tokens = sum(len(states) for states in hidden)
        host = self._host_memory((tokens, hidden[0].shape[1]), hidden[0].dtype)
        torch.cat(list(hidden), out=host)
        return host.to(self._device, non_blocking=True)

    def fetch(self, hidden: torch.Tensor) -> torch.Tensor:
        host = self._host_memory(tuple(hidden.shape), hidden.dtype)
        host.copy_(hidden, non_blocking=True)
        if self._device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self._device))
            done.synchronize()  # of this copy, not of the device
        return host

    def _host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Torch keeps pinned memory for the next step, and knows when a copy no longer reads it."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._is_pinned)


@dataclass(slots=True)
class _Layout:
    """Where the integers of the items' ragged batch lie in int32 memory.

    decodes  leading rows of one token
    bucket   rows that the batch is padded to where it is packed; else None
    width    runs of a row, a multiple of 16
    """

    items: Sequence[BatchItem]
    starts: list[int]
    lengths: list[int]
    decodes: int
    bucket: int | None
    width: int

    @classmethod
    def of(cls, items: Sequence[BatchItem], page_tokens: int, max_runs: int) -> _Layout:
        starts, lengths = row_shapes(items)
        longest = max(start + length for start, length in zip(starts, lengths, strict=True))
        width, decodes = round_up(-(-longest // page_tokens)), num_leading_decodes(lengths)
        bucket = bucket_of(decodes) if decodes == len(starts) and width <= max_runs else None
        return cls(items, starts, lengths, decodes, bucket, width if bucket is None else max_runs)

    @property
    def contexts(self) -> list[int]:
        return [start + length for start, length in zip(self.starts, self.lengths, strict=True)]

    @property
    def num_elements(self) -> int:
        if self.bucket is not None:
            return DecodeLayout(self.bucket, self.width).num_elements
        return sum(round_up(size) for size in self._sizes)

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Of the fields of ``RowFields``."""
        tokens, rows = sum(self.lengths), len(self.starts)
        others = rows - self.decodes
        return tokens, tokens, tokens, self.decodes, others, others + 1, rows * self.width

    def fields(self, memory: torch.Tensor) -> RowFields:
        """Views of ``memory``."""
        rows = len(self.starts)
        if self.bucket is not None:
            batch = DecodeLayout(self.bucket, self.width).batch(memory, rows)
            places, nothing = (batch.positions, batch.write_origins, batch.write_offsets), memory[:0]
            return RowFields(*places, batch.context_lens, nothing, nothing, batch.origins)
        pieces = torch.split(memory, [round_up(size) for size in self._sizes])
        positions, write_origins, write_offsets, decode_lens, prefill_lens, prefill_starts, origins = (
            piece[:size] for piece, size in zip(pieces, self._sizes, strict=True)
        )
        return RowFields(
            positions,
            write_origins,
            write_offsets,
            decode_lens,
            prefill_lens,
            prefill_starts,
            origins.view(rows, self.width),
        )

    def fill(self, memory: torch.Tensor, pool: KVPool) -> None:
        """Write everything to ``memory`` on the CPU."""
        if self.bucket is not None and self.bucket > len(self.starts):
            pad_rows(DecodeLayout(self.bucket, self.width).batch(memory), len(self.starts))
        fields, first = self.fields(memory), self.decodes
        origins = fields.origins.numpy()
        pool.fill_origins([item.kv for item in self.items], origins)
        index = index_decode if first == len(self.starts) else index_tokens
        indices = index(self.starts, self.lengths, origins, pool.kv.page_tokens)
        for field, values in zip(
            (fields.positions, fields.write_origins, fields.write_offsets), indices, strict=True
        ):
            field.numpy()[:] = values
        fields.decode_lens.numpy()[:] = self.contexts[:first]
        if first < len(self.starts):
            fields.prefill_lens.numpy()[:] = self.contexts[first:]
            fields.prefill_starts.numpy()[:] = list(accumulate(self.lengths[first:], initial=0))

    def ragged(self, memory: torch.Tensor) -> RaggedBatch:
        """The batch, over ``memory`` on the device."""
        fields = self.fields(memory)
        batch = RaggedBatch(
            token_bounds=list(accumulate(self.lengths, initial=0)),
            context_lens=self.contexts,
            positions=fields.positions,
            origins=fields.origins,
            write_origins=fields.write_origins,
            write_offsets=fields.write_offsets,
        )
        batch.kernel_rows = fields.kernel_rows(None if self.bucket is None else memory)
        return batch
