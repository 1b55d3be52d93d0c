"""Gated experts in one call, in every tier: what products of each expert give one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from petalsd import _C
from petalsd.errors import KVPoolError
from petalsd.models.hf.packing import PackedExperts
from petalsd.ops.expert_gate import ActivationGate, ClampedGate, ExpertBiases
from petalsd.ops.native_experts import NativeExperts
from petalsd.ops.packed_product import PackedProduct
from petalsd.ops.packed_weight import WeightFormat
from petalsd.ops.weight_packing import pack_weight
from tests.models.test_native_span import TIERS, has_tier
from tests.numeric import assert_close

EXPERTS, HIDDEN, INNER, PER_TOKEN = 5, 70, 37, 3
CLAMPED = ClampedGate(limit=1.5, alpha=1.702)
FORMATS = [WeightFormat.FLOAT32, WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4]


class Case:
    """Random experts in a format on a team, and what computes them one by one over the same weights.

    clamped  they have biases, and gpt-oss's gate; states below are as often outside of its bounds as within
    """

    def __init__(
        self, format: WeightFormat, tier: str = "auto", num_threads: int = 1, *, clamped: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.team = _C.LayerTeam(num_threads, tier)

        def product(*shape: int) -> PackedProduct:
            return PackedProduct(
                pack_weight(0.2 * torch.randn(shape, generator=generator), format), self.team
            )

        self.gate_up = [product(2 * INNER, HIDDEN) for _ in range(EXPERTS)]
        self.down = [product(HIDDEN, INNER) for _ in range(EXPERTS)]
        drawn = [torch.randn(EXPERTS, size, generator=generator) for size in (2 * INNER, HIDDEN)]
        biases, gate = ExpertBiases(*drawn) if clamped else None, CLAMPED if clamped else None
        self.native = NativeExperts(self.gate_up, self.down, self.team, gate, biases)
        self.one_by_one = PackedExperts(gate or ActivationGate(nn.SiLU()), self.gate_up, self.down, biases)


def draw(
    num_tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, experts and shares. Expert 2 gets nobody."""
    generator = torch.Generator().manual_seed(num_tokens)
    drawn = torch.stack([torch.randperm(EXPERTS - 1, generator=generator) for _ in range(num_tokens)])
    chosen = torch.tensor([0, 1, 3, 4])[drawn][:, :PER_TOKEN]
    hidden, shares = (
        torch.randn(num_tokens, HIDDEN, generator=generator),
        torch.rand(num_tokens, PER_TOKEN, generator=generator),
    )
    return hidden.to(dtype), chosen, shares.to(dtype)


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    if not has_tier(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.mark.parametrize("clamped", [False, True], ids=["silu", "clamped"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 2, 50])
def test_they_are_the_products_of_each(
    format: WeightFormat, num_tokens: int, clamped: bool, tier: str
) -> None:
    """Of some tokens and experts, of one of each, and of an expert that nobody chose."""
    case, inputs = Case(format, tier, clamped=clamped), draw(num_tokens)
    assert_close(case.native.multiply(*inputs), case.one_by_one(*inputs), 1e-4, 1e-4, format)


def test_bfloat16_is_rounded_once(tier: str) -> None:
    case, inputs = Case(WeightFormat.BFLOAT16, tier), draw(20, torch.bfloat16)
    actual, expected = case.native.multiply(*inputs), case.one_by_one(*inputs)
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).float().norm() < 0.01 * expected.float().norm()


@pytest.mark.parametrize("clamped", [False, True], ids=["silu", "clamped"])
@pytest.mark.parametrize("format", [WeightFormat.FLOAT32, WeightFormat.INT4])
def test_threads_and_company_change_no_bit(format: WeightFormat, clamped: bool, tier: str) -> None:
    """More tokens than go at once; each of them as if it were alone."""
    hidden, chosen, shares = draw(600)
    case, other = (Case(format, tier, num_threads, clamped=clamped) for num_threads in (1, 3))
    whole = case.native.multiply(hidden, chosen, shares)
    assert torch.equal(other.native.multiply(hidden, chosen, shares), whole)
    for token in (0, 317, 599):
        rows = slice(token, token + 1)
        assert torch.equal(case.native.multiply(hidden[rows], chosen[rows], shares[rows]), whole[rows])


def test_bounds_hold_and_hide_nothing(tier: str) -> None:
    """Of gates and ups beyond them, in whole registers and in what is left over; NaN stays NaN."""
    case = Case(WeightFormat.FLOAT32, tier, clamped=True)
    hidden, chosen, shares = draw(3)
    hidden[0] *= 1e4
    hidden[2, 5] = float("nan")
    actual, expected = (way(hidden, chosen, shares) for way in (case.native.multiply, case.one_by_one))
    assert actual[2].isnan().all() and expected[2].isnan().all()
    assert actual[0].abs().max() < 100
    assert_close(actual[:2], expected[:2], 1e-4, 1e-4, "bounds")


def test_no_tokens_are_nothing() -> None:
    hidden, chosen, shares = (part[:0] for part in draw(1))
    assert Case(WeightFormat.FLOAT32).native.multiply(hidden, chosen, shares).shape == (0, HIDDEN)


@pytest.mark.parametrize("wrong", [-1, EXPERTS])
def test_an_expert_that_is_none_is_refused(wrong: int) -> None:
    hidden, chosen, shares = draw(4)
    chosen[2, 1] = wrong
    with pytest.raises(KVPoolError, match=f"expert {wrong} of {EXPERTS}"):
        Case(WeightFormat.FLOAT32).native.multiply(hidden, chosen, shares)


def test_experts_that_do_not_fit_together_are_refused() -> None:
    case: Any = Case(WeightFormat.FLOAT32)
    with pytest.raises(KVPoolError, match="5 gates for 4 experts"):
        NativeExperts(case.gate_up, case.down[1:], case.team)
    narrow = ExpertBiases(torch.zeros(EXPERTS, INNER), torch.zeros(EXPERTS, HIDDEN))
    with pytest.raises(ValueError, match=r"biases have shape \[5, 37\]: it must be \[5, 74\]"):
        NativeExperts(case.gate_up, case.down, case.team, biases=narrow)
    with pytest.raises(KVPoolError, match=r"expert 4: \[70, 37\]"):
        NativeExperts([*case.gate_up[:4], case.down[0]], case.down, case.team)
