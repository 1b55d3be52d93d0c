"""Paged attention against a naive softmax per token, over slabs where everything unwritten is NaN."""

from __future__ import annotations

import pytest
import torch

from petalsd.ops.attention import dense_attention, paged_attention
from petalsd.ops.attention_plan import group_rows
from petalsd.ops.kv import write_kv
from tests.numeric import assert_close
from tests.paged_rows import PagedRows

HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, BLOCKS = 6, 2, 16, 4, 3
SCALE = HEAD_DIM**-0.5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal attention of ``[n, heads, D]`` in float64, one token and head at a time."""
    out = torch.empty_like(q, dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        first = 0 if window is None else max(0, i + 1 - window)
        for head in range(q.shape[1]):
            keys, values = (
                k[first : i + 1, head // groups].double(),
                v[first : i + 1, head // groups].double(),
            )
            out[i, head] = torch.softmax(keys @ q[i, head].double() * SCALE, 0) @ values
    return out


class Sequences:
    """Random q, k, v of some rows, fed into a paged slab step by step and compared with the naive result."""

    def __init__(self, lengths: list[int], window: int | None) -> None:
        self.window = window
        self.rows = PagedRows(BLOCKS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, num_runs=200)
        self.q = [torch.randn(n, HEADS, HEAD_DIM) for n in lengths]
        self.k = [torch.randn(n, KV_HEADS, HEAD_DIM) for n in lengths]
        self.v = [torch.randn(n, KV_HEADS, HEAD_DIM) for n in lengths]
        self.expected = [_naive(q, k, v, window) for q, k, v in zip(self.q, self.k, self.v, strict=True)]
        for _ in lengths:
            self.rows.add_row()

    def step(self, new_tokens: dict[int, int], block: int) -> dict[int, torch.Tensor]:
        """Append these rows' next tokens in ``block`` and check every result; returns them."""
        starts = {row: self.rows.lengths[row] for row in new_tokens}
        batch = self.rows.extend(new_tokens)
        q, k, v = (
            torch.cat([tensors[row][starts[row] : starts[row] + n] for row, n in new_tokens.items()])
            for tensors in (self.q, self.k, self.v)
        )
        write_kv(k, v, self.rows.kv, batch, block)
        out = paged_attention(q, self.rows.kv, batch, block, SCALE, self.window)
        results = dict(zip(new_tokens, out.split(list(new_tokens.values())), strict=True))
        for row, n in new_tokens.items():
            expected = self.expected[row][starts[row] : starts[row] + n]
            assert_close(results[row], expected, 1e-5, 1e-5, f"row {row} at {starts[row]}")
        return results


@pytest.mark.parametrize("window", [None, 1, 5, 8, 100])
@pytest.mark.parametrize("block", [0, 2])
def test_mixed_batches_equal_naive_attention(window: int | None, block: int) -> None:
    """Prefills, chunks and decodes of rows of different lengths, in one batch, equal attention done naively."""
    sequences = Sequences([30, 30, 12, 1], window)
    sequences.step({0: 7}, block)
    sequences.step({2: 3, 0: 1, 1: 13}, block)
    sequences.step({0: 1, 1: 1, 2: 1}, block)
    sequences.step({1: 9, 3: 1, 0: 5, 2: 1}, block)
    sequences.step({2: 1, 1: 1, 0: 1}, block)


@pytest.mark.parametrize("window", [None, 6])
def test_rows_of_very_different_lengths_decode_together(window: int | None) -> None:
    """A long row and short ones fall into several groups and still give their own results, in batch order."""
    sequences = Sequences([400, 3, 300, 5, 2], window)
    sequences.step({0: 399, 1: 2, 2: 299, 3: 4, 4: 1}, 1)
    sequences.step({2: 1, 1: 1, 0: 1, 4: 1, 3: 1}, 1)


def test_nan_of_one_row_does_not_reach_another() -> None:
    """A row whose own keys and values are NaN gives NaN; the rows beside it give what they give without it."""
    sequences = Sequences([9, 9, 9], None)
    sequences.step({0: 8, 2: 6}, 0)
    batch = sequences.rows.extend({0: 1, 1: 1, 2: 1})
    k, v, q = (
        torch.stack([t[0][8], t[1][0] * torch.nan, t[2][6]]) for t in (sequences.k, sequences.v, sequences.q)
    )
    write_kv(k, v, sequences.rows.kv, batch, 0)
    out = paged_attention(q, sequences.rows.kv, batch, 0, SCALE, None)
    assert out[1].isnan().all()
    assert_close(out[0], sequences.expected[0][8], 1e-5, 1e-5, "row before the NaN row")
    assert_close(out[2], sequences.expected[2][6], 1e-5, 1e-5, "row after the NaN row")


def test_a_session_in_the_middle_of_the_span_has_negative_origins() -> None:
    """A session that starts at block 2 addresses its pages through origins below its first page."""
    sequences = Sequences([20], None)
    sequences.rows.first_block = 2
    sequences.step({0: 15}, 2)
    sequences.step({0: 1}, 2)


def test_decode_does_not_depend_on_the_batch() -> None:
    """A row's decode is the same alone and beside others, up to rounding."""
    alone, together = Sequences([40, 25], None), Sequences([40, 25], None)
    together.q, together.k, together.v, together.expected = alone.q, alone.k, alone.v, alone.expected
    alone.step({0: 39}, 0)
    together.step({0: 39, 1: 20}, 0)
    single = alone.step({0: 1}, 0)
    both = together.step({1: 1, 0: 1}, 0)
    assert_close(both[0], single[0], 1e-6, 1e-6, "row 0")


@pytest.mark.parametrize("window", [None, 4, 50])
def test_dense_equals_naive_attention(window: int | None) -> None:
    """Dense attention over whole sequences equals attention done naively."""
    q, k, v = (torch.randn(2, heads, 17, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    out = dense_attention(q, k, v, SCALE, window)
    for sequence in range(2):
        by_token = [t[sequence].transpose(0, 1) for t in (q, k, v)]
        expected = _naive(*by_token, window=window).transpose(0, 1)
        assert_close(out[sequence], expected, 1e-5, 1e-5, f"sequence {sequence}")


@pytest.mark.parametrize("window", [None, 4])
def test_dense_attention_is_differentiable(window: int | None) -> None:
    """Its gradients agree with finite differences in float64."""
    inputs = [
        torch.randn(1, heads, 6, 4, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    assert torch.autograd.gradcheck(lambda q, k, v: dense_attention(q, k, v, SCALE, window), inputs)


def test_groups_bound_padding_and_memory() -> None:
    """Every row is in one group, no group pads beyond twice its shortest or gathers beyond the limit."""
    lengths = [5, 8000, 130, 100, 4100, 300, 129, 1, 260, 8000]
    groups = group_rows(lengths, max_tokens=10000)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        longest, shortest = max(lengths[row] for row in group), min(lengths[row] for row in group)
        assert group == sorted(group)
        assert longest <= max(2 * shortest, 128)
        assert len(group) == 1 or longest * len(group) <= 10000
    assert len(groups) == 6


def test_rows_of_one_length_are_one_group() -> None:
    """Equal rows are not split unless memory demands it."""
    assert group_rows([100] * 8) == [list(range(8))]
    assert len(group_rows([100] * 8, max_tokens=400)) == 2
    assert group_rows([]) == []


def test_one_query_head_per_kv_head_in_bfloat16() -> None:
    """Decode steps are computed in float32 there, and answer in bfloat16, within its rounding of the truth."""
    q, k, v = (torch.randn(3 * 9, KV_HEADS, HEAD_DIM).bfloat16() for _ in range(3))
    rows = PagedRows(BLOCKS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, dtype=torch.bfloat16)
    ids = [rows.add_row() for _ in range(3)]
    batch = rows.extend(dict.fromkeys(ids, 8))
    places = torch.arange(27).view(3, 9)
    write_kv(k[places[:, :8].flatten()], v[places[:, :8].flatten()], rows.kv, batch, 0)
    batch = rows.extend(dict.fromkeys(ids, 1))
    last = places[:, 8]
    write_kv(k[last], v[last], rows.kv, batch, 0)
    out = paged_attention(q[last], rows.kv, batch, 0, SCALE, None)
    assert out.dtype is torch.bfloat16
    for row, place in enumerate(places):
        expected = _naive(q[place], k[place], v[place], None)[-1]
        assert_close(out[row], expected, 1e-2, 1e-2, f"row {row}")
