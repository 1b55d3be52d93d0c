"""Copies of whole pages on a GPU: all slabs in one launch, without a temporary copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from petalsd.kernels.copy_pages import copy_pages as copy_pages_kernel
from petalsd.ops.eight_bit_kv import Int8KV
from petalsd.ops.launching import Argument, Options, check_tensor, launch
from petalsd.ops.ragged import PagedKV

_CHUNK_WORDS = 2048  # 16 bytes for each thread, four times


def copy_pages(kv: PagedKV, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Page ``src[i]`` becomes page ``dst[i]``, in all slabs.

    src, dst  int32 ``[n]`` on the device; all targets differ, and no page is in both: copies are made at once

    ValueError for tensors that don't fit.
    """
    check_tensor("src", src, (None,), torch.int32)
    check_tensor("dst", dst, (len(src),), torch.int32)
    words = [slab.flatten(1).view(torch.int32) for slab in kv.slabs]
    page_words = words[0].shape[1]
    scales: tuple[Argument, Argument] = (words[2], words[3]) if isinstance(kv, Int8KV) else (None, None)
    launch(
        copy_pages_kernel,
        (len(src), -(-page_words // _CHUNK_WORDS)),
        (words[0], words[1], *scales, src, dst),
        {
            "PAGE_WORDS": page_words,
            "SCALE_WORDS": words[2].shape[1] if isinstance(kv, Int8KV) else 0,
            "CHUNK": _CHUNK_WORDS,
        },
        Options(num_warps=4, num_stages=1),
    )


def independent_copies(pairs: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Parts of consecutive copies (source, target), none of which reads or writes what another one writes.

    Made one after the other they are the same as the copies made one by one.
    """
    part: list[tuple[int, int]] = []
    read: set[int] = set()
    written: set[int] = set()
    for source, target in pairs:
        if source in written or target in written or target in read:
            yield part
            part, read, written = [], set(), set()
        part.append((source, target))
        read.add(source)
        written.add(target)
    if part:
        yield part
