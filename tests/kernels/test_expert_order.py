"""The order of pairs by expert, against torch's sort, and weighted sums of what experts made of tokens."""

from __future__ import annotations

import pytest
import torch

from petalsd.ops.expert_order import ExpertOrder, order_experts, reference_sum_experts, sum_experts
from petalsd.ops.launching import record_launches
from tests.numeric import assert_close


def chosen(num_tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    """As a router chooses: no expert twice for a token."""
    return torch.rand(num_tokens, num_experts).topk(top_k).indices


def check(order: ExpertOrder, experts: torch.Tensor) -> None:
    """The pairs are sorted, and blocks cover them all, each with pairs of one expert."""
    found = order.order.tolist()
    assert found == torch.argsort(experts, stable=True).tolist()
    blocks = [block[:3] for block in order.blocks.tolist()]
    used = [block for block in blocks if block[1] < block[2]]
    assert blocks[: len(used)] == used
    assert [place for _, start, end in used for place in range(start, end)] == list(range(len(found)))
    for expert, start, end in used:
        assert end - start <= order.rows
        assert {int(experts[pair]) for pair in found[start:end]} == {expert}
    assert blocks[len(used) :] == [[0, 0, 0]] * (len(blocks) - len(used))


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"),
    [
        (1, 2, 8),  # fewer pairs than experts
        (3, 8, 60),  # experts that are no power of two
        (64, 2, 4),  # more than two blocks of an expert
        (64, 8, 128),  # more pairs than are compared at once
        (5, 4, 300),  # more experts than others have
    ],
)
def test_pairs_are_sorted_and_cut(num_tokens: int, top_k: int, num_experts: int, rows: int) -> None:
    index = chosen(num_tokens, top_k, num_experts)
    check(order_experts(index, num_experts, rows), index.flatten())


def test_all_tokens_may_have_one_expert() -> None:
    """And an expert may come twice for a token, which no router does: there are blocks enough."""
    for num_tokens in (1, 16, 17, 64):
        index = torch.full((num_tokens, 2), 3)
        check(order_experts(index, 4, 16), index.flatten())


def test_experts_that_do_not_exist_are_none_of_the_weights_behind() -> None:
    """As a router might name them that meets NaN."""
    index = torch.tensor([[-1, 1 << 40], [2, -(1 << 40)]])
    order = order_experts(index, 3, 16)
    check(order, torch.tensor([0, 2, 2, 0]))


def test_no_tokens_are_no_launch() -> None:
    with record_launches() as launches:
        order = order_experts(torch.empty(0, 2, dtype=torch.int64), 4, 16)
        sum_experts(torch.empty(0, 32), torch.empty(0, 2), torch.empty(0, 32))
    assert launches == [] and len(order.blocks) == 0


def test_a_choice_in_another_form_is_refused() -> None:
    index = torch.zeros(4, 2, dtype=torch.int64)
    for wrong in (index.int(), index.t(), index[0]):
        with pytest.raises(ValueError, match=r"it must be torch\.int64 and contiguous, with 2 dimensions"):
            order_experts(wrong, 4, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k", "width"), [(1, 1, 16), (3, 2, 1040), (7, 8, 64)])
def test_sums_are_weighted(num_tokens: int, top_k: int, width: int, dtype: torch.dtype) -> None:
    """Of weights in the dtype of states and in float32; a token of NaN stays alone."""
    rows, weights = torch.randn(num_tokens * top_k, width).to(dtype), torch.rand(num_tokens, top_k)
    if num_tokens > 1:
        rows[-1] = float("nan")
    for each in (weights, weights.to(dtype)):
        out = torch.empty(num_tokens, width, dtype=dtype)
        sum_experts(rows, each, out)
        real = slice(0, max(1, num_tokens - 1))
        expected = reference_sum_experts(rows, each)
        tolerance = 2e-3 if dtype == torch.float16 else 1e-6
        assert_close(out[real], expected[real], tolerance, tolerance, "sum")


def test_sums_of_what_does_not_fit_are_refused() -> None:
    rows, out = torch.zeros(4, 32), torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"rows has shape \[4, 32\]: it must be \[6, 32\]"):
        sum_experts(rows, torch.zeros(2, 3), out)
    with pytest.raises(ValueError, match=r"out has shape \[2, 32\]: it must be \[1, 32\]"):
        sum_experts(rows, torch.zeros(1, 4), out)
    with pytest.raises(ValueError, match="top_k_weights has strides"):
        sum_experts(rows, torch.zeros(2, 2).t(), out)
