"""Sums of a tile to which several programs contribute, each with a part of the inputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_range(num_pieces, NUM_SPLITS: tl.constexpr):
    """The pieces of this program's split: (first, end). Of the last splits some may have none."""
    each = (num_pieces + NUM_SPLITS - 1) // NUM_SPLITS
    first = tl.program_id(2) * each
    return first, tl.minimum(first + each, num_pieces)


@triton.jit
def reduce_splits(total, is_used, partials, arrivals, program, num_programs, NUM_SPLITS: tl.constexpr):
    """Leave this program's sums, and take all of a tile's if it is the last to come. (is last, sums).

    total     float32 ``[R, C]``; ``is_used`` ``[R, 1]`` or ``[1, C]`` says of which anything is wanted
    partials  float32 ``[NUM_SPLITS, num_programs, R * C]``
    arrivals  int32 ``[num_programs]``, zeros before and after
    program   the tile's number; the split is the program's in the grid's third dimension

    The order of addition does not depend on the order of arrival.
    """
    rows: tl.constexpr = total.shape[0]
    columns: tl.constexpr = total.shape[1]
    inside = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    split = tl.program_id(2)
    tl.store(partials + (split * num_programs + program) * rows * columns + inside, total, mask=is_used)
    tl.debug_barrier()  # all threads have stored before one of them says so
    is_last = tl.atomic_add(arrivals + program, 1, sem="acq_rel") == NUM_SPLITS - 1
    total = tl.zeros([rows, columns], tl.float32)
    if is_last:
        for other in range(NUM_SPLITS):
            place = partials + (other * num_programs + program) * rows * columns + inside
            total += tl.load(place, mask=is_used, other=0.0, cache_modifier=".cg")
        tl.store(arrivals + program, 0)  # as the next launch expects it
    return is_last, total
