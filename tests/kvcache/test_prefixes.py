"""The prefix cache: what is the same beginning, what is kept, and what goes first."""

from __future__ import annotations

import hashlib

import pytest
import torch

from petalsd.kvcache.prefixes import SEGMENT_TOKENS, PrefixCache, Segment, chain_digests, chain_start

ME, YOU = chain_start("me"), chain_start("you")
KEYS = torch.zeros(2, 1, SEGMENT_TOKENS, 1, 4)
SEGMENT = Segment(KEYS, KEYS, torch.zeros(1, SEGMENT_TOKENS, 8))


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(seed))


def digests(*names: str) -> list[bytes]:
    return [hashlib.sha256(name.encode()).digest() for name in names]


def cache_of(num_segments: int) -> PrefixCache:
    return PrefixCache(num_segments * SEGMENT.nbytes)


def kept(cache: PrefixCache, names: str) -> str:
    return "".join(name for name in names if digests(name)[0] in cache)


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (63, 0), (64, 1), (127, 1), (200, 3)])
def test_only_whole_segments_have_a_digest(tokens: int, expected: int) -> None:
    assert len(chain_digests(ME, prompt(tokens))) == expected


def test_two_prompts_share_the_digests_of_their_common_beginning() -> None:
    first, second = prompt(200), prompt(200)
    second[:, 150] += 1
    ours, theirs = chain_digests(ME, first), chain_digests(ME, second)
    assert ours[:2] == theirs[:2]
    assert ours[2] != theirs[2]


def test_a_digest_covers_all_before_its_segment() -> None:
    """The second halves are the same bytes, and yet not the same place in a prompt."""
    first, second = prompt(128), prompt(128)
    second[:, 0] += 1
    assert not set(chain_digests(ME, first)) & set(chain_digests(ME, second))


def test_a_prompt_in_two_steps_has_the_digests_of_the_whole() -> None:
    hidden = prompt(192)
    first = chain_digests(ME, hidden[:, :128])
    assert [*first, *chain_digests(first[-1], hidden[:, 128:])] == chain_digests(ME, hidden)


def test_others_and_other_shapes_share_nothing() -> None:
    hidden = prompt(64)
    seen = {
        *chain_digests(ME, hidden),
        *chain_digests(YOU, hidden),
        *chain_digests(ME, hidden.view(torch.int32).view(torch.float32).view(1, 64, 8).half()),
        *chain_digests(ME, hidden.expand(2, -1, -1)),
        *chain_digests(ME, hidden.view(1, 128, 4)),
    }
    assert len(seen) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parts_of_larger_tensors_are_read_where_they_lie(dtype: torch.dtype) -> None:
    whole = torch.randn(2, 300, 8).to(dtype)
    part = whole[1:, 100:228]
    assert chain_digests(ME, part) == chain_digests(ME, part.clone())


def test_the_longest_known_beginning_is_found() -> None:
    cache = cache_of(9)
    a, b, c, d = digests(*"abcd")
    assert cache.find([a, b]) == []
    for digest in (a, b, d):
        assert cache.put(digest, SEGMENT)
    assert len(cache.find([a, b, c, d])) == 2  # d without c before it is no use
    assert cache.find([c, d]) == []
    assert cache.nbytes == 3 * SEGMENT.nbytes


def test_the_one_used_least_recently_goes_first_and_ends_before_beginnings() -> None:
    cache = cache_of(4)
    for digest in digests(*"abcd"):
        cache.put(digest, SEGMENT)
    cache.touch(digests("c", "d"))
    cache.find(digests("a", "b"))
    cache.put(*digests("e"), SEGMENT)
    assert kept(cache, "abcde") == "abce"
    cache.put(*digests("f"), SEGMENT)
    assert kept(cache, "abcdef") == "abef"
    cache.put(*digests("g"), SEGMENT)
    assert kept(cache, "abcdefg") == "aefg"
    assert cache.nbytes == cache.max_bytes


def test_a_segment_that_is_kept_counts_once() -> None:
    cache = cache_of(2)
    (a,) = digests("a")
    assert cache.put(a, SEGMENT)
    assert cache.put(a, SEGMENT)
    assert cache.nbytes == SEGMENT.nbytes


def test_what_never_fits_drives_nothing_out() -> None:
    cache = PrefixCache(SEGMENT.nbytes)
    a, b = digests("a", "b")
    cache.put(a, SEGMENT)
    larger = Segment(KEYS.repeat(2, 1, 1, 1, 1), KEYS, SEGMENT.states)
    assert not cache.put(b, larger)
    assert kept(cache, "ab") == "a"
    assert cache.room_for(SEGMENT) == SEGMENT_TOKENS
    assert cache.room_for(larger) == 0
    assert not PrefixCache(0).put(a, SEGMENT)
