"""Copies of whole pages in all slabs of a pool, for copy-on-write, beam reorder and moved runs."""

import triton
import triton.language as tl


@triton.jit
def copy_slab_pages(slab, source, target, chunk, PAGE_WORDS: tl.constexpr, CHUNK: tl.constexpr):
    """``CHUNK`` words of one page; slab: ``[N, PAGE_WORDS]`` of any integer type."""
    words = chunk * CHUNK + tl.arange(0, CHUNK)
    is_word = words < PAGE_WORDS
    tl.store(
        slab + target * PAGE_WORDS + words,
        tl.load(slab + source * PAGE_WORDS + words, mask=is_word),
        mask=is_word,
    )


@triton.jit
def copy_pages(
    k, v, k_scales, v_scales, sources, targets,
    PAGE_WORDS: tl.constexpr, SCALE_WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (copies, ceil(PAGE_WORDS / CHUNK)).

    k, v                ``[N, PAGE_WORDS]`` int32: the slabs' memory
    k_scales, v_scales  ``[N, SCALE_WORDS]`` int32; not there when SCALE_WORDS is 0
    sources, targets    int32 ``[copies]``; no page is in both, for the copies are made in any order
    """
    copy = tl.program_id(0)
    chunk = tl.program_id(1)
    source = tl.load(sources + copy).to(tl.int64)
    target = tl.load(targets + copy).to(tl.int64)
    copy_slab_pages(k, source, target, chunk, PAGE_WORDS, CHUNK)
    copy_slab_pages(v, source, target, chunk, PAGE_WORDS, CHUNK)
    if SCALE_WORDS > 0:
        # A page has fewer scales than elements, so the chunks of the elements cover them.
        copy_slab_pages(k_scales, source, target, chunk, SCALE_WORDS, CHUNK)
        copy_slab_pages(v_scales, source, target, chunk, SCALE_WORDS, CHUNK)
