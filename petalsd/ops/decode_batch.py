"""The rows of a batch as GPU kernels read them: int32 on the device, lengths and page tables included.

``ops.ragged`` has the symbols and says how ``origins`` address pages. Nothing here is read by the host once it is
built, so that a captured graph serves every batch that is written to the same addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

ORIGINS_MULTIPLE = 16
"""The stride between two rows of ``origins`` is a multiple of this, in elements: kernels count on it."""


class TokenPlaces(Protocol):
    """Where the new tokens of a batch stand and are written to: all that ``rope_and_write`` needs."""

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
