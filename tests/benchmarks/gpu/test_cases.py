"""What a run on a GPU measures, in the interpreter: kernels are right, beside torch's own on the same pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import attention_cases, expert_cases, small_cases
from benchmarks.gpu.case import ERROR, RATE, TIME, TOLERANCES, Case, measure, relative_error
from benchmarks.gpu.pages import PAGE_TOKENS, Rows
from benchmarks.report import OURS, TORCH
from benchmarks.timing import Work
from tests.benchmarks.gpu.doubles import SITE, TINY, FakeClock

CASES: dict[str, Callable[[], Case]] = {
    "decode": lambda: attention_cases.decode(SITE, TINY, 3, 70),
    "decode in parts": lambda: attention_cases.decode(SITE, TINY, 1, 1200),
    "prefill": lambda: attention_cases.prefill(SITE, TINY, 2, 20, 64),
    "whole prefill": lambda: attention_cases.prefill(SITE, TINY, 1, 40, 40),
    "norm": lambda: small_cases.norm(SITE, TINY, 3),
    "activation": lambda: small_cases.activation(SITE, TINY, 3),
    "rope": lambda: small_cases.rope(SITE, TINY, 2),
    "copies": lambda: small_cases.copies(SITE, TINY),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_checked_and_timed(name: str) -> None:
    """Its error first, within the tolerance, then its time and torch's in one setting."""
    case = CASES[name]()
    rows = list(measure(case, SITE, FakeClock()))
    assert (rows[0].metric, rows[0].provider) == (ERROR, OURS)
    assert rows[0].spread.median <= TOLERANCES[torch.float16]
    times = [row for row in rows if row.metric == TIME]
    assert [row.provider for row in times] == [OURS, *case.rivals]
    assert all(row.setting == times[0].setting and row.nbytes == case.nbytes for row in times)
    assert case.nbytes > 0


class UnevenClock(FakeClock):
    """Every other run takes twice as long."""

    def seconds(self, work: Work, samples: int, *, is_replayed: bool = True) -> list[float]:
        work()
        return [1e-6, 2e-6] * samples


def test_rates_vary_as_the_times_that_they_are_of() -> None:
    """Or chance, which the spread of times tells from a loss, would count as one in rates."""
    case = replace(CASES["norm"](), flops=4_000_000, rivals={})
    (rate,) = [row.spread for row in measure(case, SITE, UnevenClock()) if row.metric == RATE]
    assert (rate.p20, rate.median, rate.p80) == pytest.approx((2.0, 3.0, 4.0))


def test_products_are_measured_in_all_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, int8 and int4 by the same weight, each with its rate."""
    monkeypatch.setattr(small_cases, "BATCHES", (2,))
    cases = list(small_cases.products(SITE, "down", SITE.randn(64, 128)))
    assert [case.kernel for case in cases[:3]] == ["down dense", "down int8", "down int4"]
    assert cases[2].nbytes < cases[1].nbytes < cases[0].nbytes
    for case in cases[:3]:
        rows = list(measure(case, SITE, FakeClock()))
        assert rows[0].spread.median <= TOLERANCES[torch.float16]
        assert {row.metric for row in rows} == {ERROR, TIME, RATE}


def test_products_of_experts_are_measured_in_all_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same weights, of which no more count than what is asked of them."""
    monkeypatch.setattr(expert_cases, "BATCHES", (2,))
    cases = list(expert_cases.cases(SITE, expert_cases.ExpertShape(8, 2, 64, 32)))
    assert [case.kernel for case in cases] == ["experts dense", "experts int8", "experts int4"]
    for case in cases:
        rows = list(measure(case, SITE, FakeClock()))
        assert rows[0].spread.median <= TOLERANCES[torch.float16]
        assert {row.metric for row in rows} == {ERROR, TIME, RATE}
    assert cases[2].nbytes < cases[1].nbytes < cases[0].nbytes < 8 * 64 * 64 * 2


def test_wrong_values_are_seen() -> None:
    """Also those that are not numbers."""
    expected = torch.ones(4)
    assert relative_error(expected * 1.5, expected) == pytest.approx(0.5)
    assert relative_error(torch.tensor([1.0, 1.0, 1.0, torch.nan]), expected) == float("inf")


def test_pages_hold_what_rows_say() -> None:
    """Pages are shuffled and none is used twice; the dense copy has the tokens in order."""
    rows = Rows.draw(SITE, TINY, [70, 70], num_blocks=3)
    used = torch.cat([row[: -(-70 // PAGE_TOKENS)] for row in rows.origins])
    pages = torch.cat([used + block for block in range(3)])
    assert len(pages.unique()) == len(pages) == len(rows.kv.k) - 1
    assert int(pages.min()) == 1
    k, _ = rows.dense()
    last = rows.decode()
    assert torch.equal(k[1, :, -1], rows.kv.k[last.write_origins[1], last.write_offsets[1]])
    assert TORCH in CASES["decode"]().rivals
