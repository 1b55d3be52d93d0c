"""What the KV cache costs, and what fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from petalsd.kvcache.sizing import KVGeometry, pages_for, tokens_for

LLAMA_70B = KVGeometry(page_tokens=16, num_kv_heads=8, head_dim=128, stored=torch.bfloat16)


def test_a_page_holds_keys_and_values() -> None:
    """16 tokens of 8 heads of 128 bfloat16 numbers are 32 KiB, twice."""
    assert LLAMA_70B.slab_page_bytes == 32 << 10
    assert LLAMA_70B.page_bytes == 64 << 10
    assert LLAMA_70B.page_shape == (16, 8, 128)


def test_elements_of_8_bits_differ_by_their_scales() -> None:
    """int8 has one of 4 bytes for each token and head, float8 none."""
    page_bytes = [
        replace(LLAMA_70B, stored=stored).page_bytes for stored in (torch.int8, torch.float8_e4m3fn)
    ]
    assert page_bytes == [2 * 16 * 8 * (128 + 4), 2 * 16 * 8 * 128]


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (16384, 1024)])
def test_tokens_are_rounded_up_to_pages(tokens: int, pages: int) -> None:
    """A started page is a page."""
    assert LLAMA_70B.tokens_to_pages(tokens) == pages


@pytest.mark.parametrize(
    ("kv_tokens", "num_blocks", "pages"), [(16, 1, 2), (17, 1, 3), (16384, 40, 40961), (1, 5, 6)]
)
def test_a_pool_has_whole_pages_for_every_block(kv_tokens: int, num_blocks: int, pages: int) -> None:
    """kv_tokens tokens fit into each block, and page 0 is there beside them."""
    assert pages_for(kv_tokens, num_blocks, page_tokens=16) == pages


@pytest.mark.parametrize("memory_bytes", [0, 64 << 10, 41 * (64 << 10), (1 << 30) + 12345, 20 << 30])
def test_what_fits_into_memory_is_the_most_that_fits(memory_bytes: int) -> None:
    """The pool for tokens_for fits, and one more page per block does not."""
    tokens = tokens_for(memory_bytes, 40, LLAMA_70B)
    assert tokens == 0 or pages_for(tokens, 40, 16) * LLAMA_70B.page_bytes <= memory_bytes
    assert pages_for(tokens + 16, 40, 16) * LLAMA_70B.page_bytes > memory_bytes


@pytest.mark.parametrize("field", ["page_tokens", "num_kv_heads", "head_dim"])
def test_an_empty_page_is_refused(field: str) -> None:
    """Every number of a geometry is at least 1; the error names the one that is not."""
    numbers = {"page_tokens": 16, "num_kv_heads": 8, "head_dim": 128}
    with pytest.raises(ValueError, match=f"{field} = 0"):
        KVGeometry(**{**numbers, field: 0}, stored=torch.bfloat16)
