"""Sums of a tile to which several programs contribute, each with a part of the inputs."""

from __future__ import annotations

import triton
import triton.language as tl

VALUES_AT_ONCE = tl.constexpr(4096)  # of all threads: a chain of loads would cost more than the product


@triton.jit
def split_range(num_pieces, NUM_SPLITS: tl.constexpr):
    """The pieces of this program's split: (first, end). Of the last splits some may have none."""
    each = (num_pieces + NUM_SPLITS - 1) // NUM_SPLITS
    first = tl.program_id(2) * each
    return first, tl.minimum(first + each, num_pieces)


@triton.jit
def reduce_splits(total, partials, arrivals, program, num_programs, NUM_SPLITS: tl.constexpr):
    """Leave this program's sums, and take all of a tile's if it is the last to come. (is last, sums).

    total     float32 ``[R, C]``
    partials  float32 ``[NUM_SPLITS, num_programs, R * C]``
    arrivals  int32 ``[num_programs]``, zeros before and after
    program   the tile's number; the split is the program's in the grid's third dimension

    The order of addition does not depend on the order of arrival.
    """
    rows: tl.constexpr = total.shape[0]
    columns: tl.constexpr = total.shape[1]
    AT_ONCE: tl.constexpr = min(NUM_SPLITS, max(1, VALUES_AT_ONCE // (rows * columns)))
    inside = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    split = tl.program_id(2)
    tl.store(partials + (split * num_programs + program) * rows * columns + inside, total)
    tl.debug_barrier()  # all threads have stored before one of them says so
    is_last = tl.atomic_add(arrivals + program, 1, sem="acq_rel") == NUM_SPLITS - 1
    total = tl.zeros([rows, columns], tl.float32)
    if is_last:
        for first in range(0, NUM_SPLITS, AT_ONCE):
            for other in tl.static_range(AT_ONCE):  # loads that do not wait for each other
                place = partials + ((first + other) * num_programs + program) * rows * columns + inside
                total += tl.load(place, cache_modifier=".cg")
        tl.store(arrivals + program, 0)  # as the next launch expects it
    return is_last, total
