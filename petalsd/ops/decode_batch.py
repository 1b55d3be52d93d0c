"""The rows of a batch as GPU kernels read them: int32 on the device, lengths and page tables included.

``ops.ragged`` has the symbols and says how ``origins`` address pages. Nothing here is read by the host once it is
built, so that a captured graph serves every batch that is written to the same addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch

from petalsd.ops.ragged import RaggedBatch

ORIGINS_MULTIPLE = 16
"""Fields begin at multiples of so many elements, and so do the rows of ``origins``: kernels count on it."""

DECODE_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Rows that a decode step is padded to where its sizes must be among a few."""


def bucket_of(rows: int) -> int | None:
    """The smallest bucket that holds so many rows; None when there is none."""
    return next((bucket for bucket in DECODE_BUCKETS if rows <= bucket), None)


@dataclass(slots=True)
class Places:
    """Where the T new tokens of any batch stand and are written to; the fields as in ``DecodeBatch``."""

    positions: torch.Tensor
    write_origins: torch.Tensor
    write_offsets: torch.Tensor


@dataclass(slots=True)
class DecodeBatch:
    """B rows with one new token each. All int32.

    positions      ``[B]`` absolute position of the new token
    context_lens   ``[B]`` tokens that the row attends to, the new one included; 0: a padding row, whose attention
                   output is zeros
    origins        ``[B, max_runs]``, the stride of a row a multiple of 16 elements; entries past a row's runs are
                   undefined
    write_origins  ``[B]`` origin of the run that the new token is written to
    write_offsets  ``[B]`` its place within that page; -1: a padding row, of which nothing is written
    """

    positions: torch.Tensor
    context_lens: torch.Tensor
    origins: torch.Tensor
    write_origins: torch.Tensor
    write_offsets: torch.Tensor


@dataclass(slots=True)
class PrefillBatch:
    """R rows with any number of new tokens, T in all, concatenated. All int32.

    positions      ``[T]`` absolute position of each new token
    context_lens   ``[R]`` tokens that the row attends to, its new ones included
    origins        ``[R, max_runs]`` as in ``DecodeBatch``
    write_origins  ``[T]`` origin of the run that each new token is written to
    write_offsets  ``[T]`` its place within that page; -1: nothing is written
    row_starts     ``[R + 1]``: row i's new tokens are ``row_starts[i]:row_starts[i + 1]`` of the batch
    """

    positions: torch.Tensor
    context_lens: torch.Tensor
    origins: torch.Tensor
    write_origins: torch.Tensor
    write_offsets: torch.Tensor
    row_starts: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeLayout:
    """A decode batch of ``rows`` rows in one piece of int32 memory, so that one copy moves it.

    Each field begins at a multiple of 16 elements. ``max_runs`` is a multiple of 16.
    """

    rows: int
    max_runs: int

    @property
    def num_elements(self) -> int:
        return 4 * self._field + self.rows * self.max_runs

    @property
    def _field(self) -> int:
        return round_up(self.rows)

    def batch(self, memory: torch.Tensor, rows: int | None = None) -> DecodeBatch:
        """The fields of the first ``rows`` rows, or of all: views of ``memory``, int32 and large enough."""
        end = 4 * self._field
        fields = memory[:end].view(4, self._field)[:, : self.rows if rows is None else rows]
        positions, context_lens, write_origins, write_offsets = fields.unbind()
        origins = memory[end : self.num_elements].view(self.rows, self.max_runs)
        return DecodeBatch(positions, context_lens, origins[:rows], write_origins, write_offsets)


def pad_rows(batch: DecodeBatch, first: int) -> None:
    """Make the rows from ``first`` padding: at position 0, without a context, written nowhere."""
    for field in (batch.positions, batch.context_lens, batch.write_origins, batch.origins):
        field[first:] = 0
    batch.write_offsets[first:] = -1


@dataclass(slots=True)
class KernelRows:
    """The rows of a ragged batch as kernels take them: leading ones of one token together, the others together.

    places   of all tokens
    decode   the leading rows of one new token; None: there are none. They are the batch's first tokens too
    prefill  the rows after them; None: there are none
    packed   where the batch is one of at most ``DECODE_BUCKETS[-1]`` decode rows: all its fields, padded to a
             bucket of rows, in the order of ``DecodeLayout``. None: it is another, or does not come in that form
    """

    places: Places
    decode: DecodeBatch | None
    prefill: PrefillBatch | None
    packed: torch.Tensor | None = None

    @property
    def num_decodes(self) -> int:
        """How many tokens are those of ``decode``."""
        return 0 if self.decode is None else len(self.decode.context_lens)


@dataclass(slots=True)
class RowFields:
    """The integers of R rows of T tokens, all int32, as they lie in memory.

    decode_lens    of the leading rows of one token: tokens that each attends to
    prefill_lens   likewise of the rows after them
    prefill_starts where those begin, counted from the first of their tokens, and where the last ends
    origins        ``[R, max_runs]``
    """

    positions: torch.Tensor
    write_origins: torch.Tensor
    write_offsets: torch.Tensor
    decode_lens: torch.Tensor
    prefill_lens: torch.Tensor
    prefill_starts: torch.Tensor
    origins: torch.Tensor

    def kernel_rows(self, packed: torch.Tensor | None = None) -> KernelRows:
        """Over the same memory."""
        first = len(self.decode_lens)
        places = (self.positions, self.write_origins, self.write_offsets)
        if not len(self.prefill_lens):
            at, origin, offset = places
            whole = DecodeBatch(at, self.decode_lens, self.origins, origin, offset)
            return KernelRows(Places(*places), whole, None, packed)
        decode = None
        if first:
            at, origin, offset = (field[:first] for field in places)
            decode = DecodeBatch(at, self.decode_lens, self.origins[:first], origin, offset)
        at, origin, offset = (field[first:] for field in places)
        origins = self.origins[first:]
        prefill = PrefillBatch(at, self.prefill_lens, origins, origin, offset, self.prefill_starts)
        return KernelRows(Places(*places), decode, prefill)


def kernel_rows(batch: RaggedBatch) -> KernelRows:
    """The batch's, from the batch when they came with it or were made before."""
    if batch.kernel_rows is None:
        batch.kernel_rows = _convert(batch)
    return batch.kernel_rows


def num_leading_decodes(lengths: Iterable[int]) -> int:
    """How many rows at the front have one token; ``lengths`` are the rows' tokens."""
    return sum(1 for _ in takewhile(lambda length: length == 1, lengths))


def round_up(elements: int) -> int:
    """To a multiple of 16."""
    return -(-elements // ORIGINS_MULTIPLE) * ORIGINS_MULTIPLE


def _convert(batch: RaggedBatch) -> KernelRows:
    """Of a batch whose tensors may be of another dtype and width."""
    device, bounds = batch.origins.device, batch.token_bounds
    first = num_leading_decodes(end - start for start, end in pairwise(bounds))

    def as_tensor(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    origins = batch.origins.new_zeros(batch.num_rows, round_up(batch.origins.shape[1]), dtype=torch.int32)
    origins[:, : batch.origins.shape[1]] = batch.origins
    fields = RowFields(
        positions=batch.positions.to(torch.int32),
        write_origins=batch.write_origins.to(torch.int32),
        write_offsets=batch.write_offsets.to(torch.int32),
        decode_lens=as_tensor(batch.context_lens[:first]),
        prefill_lens=as_tensor(batch.context_lens[first:]),
        prefill_starts=as_tensor([bound - first for bound in bounds[first:]]),
        origins=origins,
    )
    return fields.kernel_rows()
