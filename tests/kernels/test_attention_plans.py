"""How attention is cut for a device, and what its launchers refuse."""

from __future__ import annotations

import pytest
import torch

from petalsd.ops.attention_checks import check_pages, check_queries, check_rows
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_attention import MIN_TILES, DecodePlan, decode_attention, num_splits
from petalsd.ops.decode_batch import DecodeBatch
from petalsd.ops.eight_bit_kv import Int8KV
from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.ragged import PagedKV
from petalsd.ops.score_rule import Alibi, ScoreRule

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "kv_heads", "num_sms", "max_tiles", "expected"),
    [
        (1, 8, 132, 512, 64),  # four times 132 programs, in a power of two
        (1, 1, 132, 4096, 64),  # no more than are combined at once
        (8, 8, 132, 512, 8),
        (64, 8, 132, 512, 1),  # rows and heads fill the device
        (1, 8, 132, 16, 4),  # short contexts have nothing to split
        (1, 8, 132, 3, 1),
        (1, 8, 1, 512, 1),
    ],
)
def test_splits_fill_the_device_and_have_work(
    rows: int, kv_heads: int, num_sms: int, max_tiles: int, expected: int
) -> None:
    """A power of two, of at least four tiles each."""
    assert num_splits(rows, kv_heads, num_sms, max_tiles) == expected
    assert expected == 1 or expected * MIN_TILES <= max_tiles


def pages(head_dim: int = 64, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> PagedKV:
    return PagedKV(*(torch.zeros(4, 16, kv_heads, head_dim, dtype=dtype) for _ in range(2)))


def test_a_plan_of_one_split_has_no_scratch_memory() -> None:
    """And a window bounds how far a context reaches."""
    wide, narrow = (DecodePlan.create(1, 8, pages(), 132, context) for context in (1 << 15, 128))
    assert (wide.num_splits, wide.part_acc.shape) == (64, (1, 8, 64, 64))
    assert (narrow.num_splits, narrow.part_acc) == (1, None)


@pytest.mark.parametrize(
    ("kv", "dtype", "reason"),
    [
        (pages(72), torch.float32, "head size = 72: kernels serve multiples of 16 up to 256"),
        (pages(272), torch.float32, "head size = 272"),
        (PagedKV(*(slab[:, :, :1] for slab in pages().slabs)), torch.float32, "contiguous"),
        (pages(), torch.float16, "compute in torch.float32, not in torch.float16"),
        (Int8KV.allocate((4, 16, 2, 64), torch.float32, CPU), torch.float16, "not in torch.float16"),
        (HeadMajorKV.allocate((4, 16, 2, 64), torch.float32), torch.float32, "HeadMajorKV"),
    ],
)
def test_pages_that_kernels_cannot_read_are_refused(kv: PagedKV, dtype: torch.dtype, reason: str) -> None:
    """A stride that is no multiple of 16 elements would cost all asynchronous copies."""
    with pytest.raises(ValueError, match=reason):
        check_pages(kv, dtype)


def test_queries_and_rows_that_do_not_fit_are_refused() -> None:
    """By heads, by where they lie, by dtype and by the stride of the page table."""
    q = torch.zeros(3, 8, 64)
    with pytest.raises(ValueError, match="q has 7 heads: they must be a multiple of 2 KV heads"):
        check_queries("q", q[:, :7], pages(), q[:, :7])
    with pytest.raises(ValueError, match="heads must lie 64 elements apart"):
        check_queries("q", q[:, ::2], pages(), q[:, ::2])
    with pytest.raises(ValueError, match=r"out is torch\.float16"):
        check_queries("out", q.half(), pages(), q)
    lengths, origins = torch.zeros(3, dtype=torch.int32), torch.zeros(3, 32, dtype=torch.int32)
    check_rows(3, lengths, origins)
    with pytest.raises(ValueError, match=r"origins is torch\.int64"):
        check_rows(3, lengths, origins.long())
    with pytest.raises(ValueError, match="origins have rows 5 apart: it must be a multiple of 16"):
        check_rows(1, lengths[:1], torch.zeros(1, 5, dtype=torch.int32))


def test_a_plan_for_another_size_is_refused() -> None:
    """Its scratch memory would be too small."""
    q, kv, lengths = torch.zeros(3, 8, 64), pages(), torch.zeros(3, dtype=torch.int32)
    batch = DecodeBatch(lengths, lengths, torch.zeros(3, 16, dtype=torch.int32), lengths, lengths)
    plan = DecodePlan.create(2, 8, kv, 132, 1 << 15)
    with pytest.raises(ValueError, match=r"the plan is for \[2, 8\] rows and heads, q has \[3, 8\]"):
        decode_attention(q, kv, batch, 0, AttentionRule(1.0), plan, q.clone())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"window": 0}, "window = 0"),
        ({"softcap": -1.0}, r"softcap = -1\.0"),
        ({"sinks": torch.zeros(4).half()}, "sinks are torch.float16"),
        ({"sinks": torch.zeros(4), "slopes": torch.zeros(4)}, "do not go together"),
    ],
)
def test_rules_that_make_no_sense_are_refused(fields: dict[str, object], reason: str) -> None:
    """The message names the field and its value."""
    with pytest.raises(ValueError, match=reason):
        AttentionRule(1.0, **fields)


def test_a_rule_is_that_of_the_family() -> None:
    """Slopes in bfloat16 mean rounded products; sinks of the model's dtype become float32."""
    slopes = torch.tensor([0.5, 0.25])
    exact, rounded = (
        AttentionRule.of(1.0, None, ScoreRule(alibi=Alibi(one, 2.0))) for one in (slopes, slopes.bfloat16())
    )
    assert (exact.rounds_biases, rounded.rounds_biases, rounded.alibi_factor) == (False, True, 2.0)
    assert rounded.slopes.dtype == torch.float32
    assert AttentionRule.of(1.0, 5, ScoreRule(sinks=slopes.bfloat16())).sinks.dtype == torch.float32
    with pytest.raises(ValueError, match=r"slopes are torch\.float16"):
        AttentionRule.of(1.0, None, ScoreRule(alibi=Alibi(slopes.half())))
