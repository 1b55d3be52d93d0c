"""From the sessions' slices of one iteration to the ragged tensors that the blocks compute on.

An *item* is one session's slice. Items are concatenated in order; within an item, row after row:

    items        | item 0 (2 rows x 3 tokens)  | item 1 (1 row x 1) |
    rows         | row 0       | row 1         | row 2              |
    tokens       | 0   1   2   | 3   4   5     | 6                  |
    token_bounds   0             3               6                    7
    item_rows      0                             2                    3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVSession
from petalsd.ops.ragged import RaggedBatch
from petalsd.types import BlockSpan


@dataclass(slots=True)
class BatchItem:
    """One session's share of an iteration.

    span     the session's blocks
    kv       its pages, which already cover ``start + tokens`` positions of each row
    rows     its batch size
    start    position of the first new token, the same in every row
    tokens   new tokens in each row
    step_end position after the whole step, of which this may be a chunk: ``>= start + tokens``
    hidden   ``[rows * tokens, M]`` in the model's dtype on the CPU, row after row
    prompts  None, or ``[len(span), rows or 1, prefix, M]`` with prefix <= tokens, on the device: slice k is added
             to each row's first ``prefix`` tokens at the input of the span's block k
    adapter  that of the session
    """

    span: BlockSpan
    kv: KVSession
    rows: int
    start: int
    tokens: int
    step_end: int
    hidden: torch.Tensor
    prompts: torch.Tensor | None = None
    adapter: str | None = None


@dataclass(slots=True)
class ItemBatch:
    """A ragged batch, and which part of it belongs to whom.

    item_tokens  one slice per item: its tokens in the batch
    item_rows    one slice per item: its rows
    """

    ragged: RaggedBatch
    item_tokens: list[slice]
    item_rows: list[slice]


def build_batch(items: Sequence[BatchItem], pool: KVPool) -> ItemBatch:
    """Lay the items out on the CPU and look up their pages. The pool's copies must have been applied."""
    starts, lengths = row_shapes(items)
    contexts = [start + length for start, length in zip(starts, lengths, strict=True)]
    page_tokens = pool.kv.page_tokens
    origins = np.empty((len(starts), -(-max(contexts) // page_tokens)), dtype=np.int32)
    pool.fill_origins([item.kv for item in items], origins)
    index = index_decode if max(lengths) == 1 else index_tokens
    positions, write_origins, write_offsets = map(
        torch.from_numpy, index(starts, lengths, origins, page_tokens)
    )
    ragged = RaggedBatch(
        token_bounds=list(accumulate(lengths, initial=0)),
        context_lens=contexts,
        positions=positions,
        origins=torch.from_numpy(origins),
        write_origins=write_origins,
        write_offsets=write_offsets,
    )
    return ItemBatch(ragged, *item_bounds(items))


def row_shapes(items: Sequence[BatchItem]) -> tuple[list[int], list[int]]:
    """Of each row: the position of its first new token, and how many there are."""
    starts = [item.start for item in items for _ in range(item.rows)]
    return starts, [item.tokens for item in items for _ in range(item.rows)]


def index_tokens(
    starts: list[int], lengths: list[int], origins: npt.NDArray[np.int32], page_tokens: int
) -> npt.NDArray[np.int64]:
    """``[3, T]``: positions, write origins and write offsets of all tokens, from the rows' figures."""
    rows = np.repeat(np.arange(len(starts)), lengths)
    first_tokens = np.cumsum(lengths) - lengths
    positions = np.arange(len(rows)) + (np.array(starts) - first_tokens)[rows]
    runs = positions // page_tokens
    return np.stack((positions, origins[rows, runs], positions - runs * page_tokens))


def index_decode(
    starts: list[int], lengths: list[int], origins: npt.NDArray[np.int32], page_tokens: int
) -> npt.NDArray[np.int64]:
    """``index_tokens`` where each row has one token. A few rows in plain Python cost less than array calls."""
    places = [divmod(start, page_tokens) for start in starts]
    write_origins = [origins.item(row, run) for row, (run, _) in enumerate(places)]
    numbers = [*starts, *write_origins, *[offset for _, offset in places]]
    return np.array(numbers).reshape(3, -1)


def step_ends(items: Sequence[BatchItem]) -> torch.Tensor:
    """``[T]`` int64 on the CPU: the ``step_end`` of each token's item."""
    return torch.from_numpy(
        np.repeat([item.step_end for item in items], [item.rows * item.tokens for item in items])
    )


def item_bounds(items: Sequence[BatchItem]) -> tuple[list[slice], list[slice]]:
    """The slices of ``ItemBatch``: each item's tokens, and its rows."""
    tokens, rows = [], []
    token = row = 0
    for item in items:
        tokens.append(slice(token, token := token + item.rows * item.tokens))
        rows.append(slice(row, row := row + item.rows))
    return tokens, rows


def selected_tokens(item_tokens: Sequence[slice], chosen: Sequence[int]) -> npt.NDArray[np.int64]:
    """``[T']``: the tokens of the chosen items, whose slices ``item_tokens`` has, in the whole batch."""
    tokens: npt.NDArray[np.int64] = np.r_[*(item_tokens[i] for i in chosen)]
    return tokens


def select_items(batch: ItemBatch, chosen: Sequence[int]) -> tuple[RaggedBatch, torch.Tensor]:
    """The batch on the CPU of some of the items, and ``[T']`` int64: which tokens of the whole its tokens are."""
    whole = batch.ragged
    tokens = torch.from_numpy(selected_tokens(batch.item_tokens, chosen))
    rows = np.r_[*(batch.item_rows[i] for i in chosen)].tolist()
    bounds = [0]
    for row in rows:
        bounds.append(bounds[-1] + whole.token_bounds[row + 1] - whole.token_bounds[row])
    part = RaggedBatch(
        token_bounds=bounds,
        context_lens=[whole.context_lens[row] for row in rows],
        positions=whole.positions[tokens],
        origins=whole.origins[torch.tensor(rows)],
        write_origins=whole.write_origins[tokens],
        write_offsets=whole.write_offsets[tokens],
    )
    return part, tokens
