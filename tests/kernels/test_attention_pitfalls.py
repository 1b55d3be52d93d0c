"""What attention kernels are known to get wrong, each of it once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from petalsd.errors import EngineError
from petalsd.kernels.attention_tile import rounded_to_bfloat16, tile_slots
from petalsd.ops.attention_reference import reference_attention
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_attention import DecodePlan, decode_attention
from petalsd.ops.decode_batch import DecodeBatch
from petalsd.ops.eight_bit_kv import Float8KV, Int8KV
from petalsd.ops.launching import record_launches
from petalsd.ops.prefill_attention import prefill_attention
from petalsd.ops.ragged import PagedKV
from tests.device import interpreted
from tests.kernels.attention_rows import (
    BLOCK,
    F16,
    F32,
    TOLERANCE,
    AttentionCase,
    AttentionRows,
    decode_batch,
    prefill_batch,
)
from tests.kernels.sparse_slabs import sparse_pages
from tests.numeric import assert_close


def decode_rows(case: AttentionCase, *lengths: int) -> tuple[AttentionRows, torch.Tensor, object]:
    """Rows of these lengths that are about to decode: their queries and their batch."""
    rows = case.rows()
    rows.append({row: length - 1 for row, length in enumerate(lengths) if length > 1})
    return rows, *rows.append(dict.fromkeys(range(len(lengths)), 1))


def test_a_split_without_work_leaves_nothing_behind() -> None:
    """Idle splits would take -inf from -inf, and what was in the scratch memory before is not read."""
    rows, q, batch = decode_rows(AttentionCase(1, 1, 64, 16, 8, F32), 1, 257, 16)
    plan = rows.plan(4, 8)
    for part in (plan.part_acc, plan.part_greatest, plan.part_total):
        part.fill_(torch.nan)
    rows.check_decode(q, batch, AttentionRule(0.125), plan, padding=1)


def test_a_sink_counts_once_whatever_the_splits() -> None:
    """It is in the first split alone."""
    rows, q, batch = decode_rows(AttentionCase(2, 1, 64, 16, 1, F32), 700)
    rule = AttentionRule(0.125, sinks=torch.tensor([6.0, 4.0]))
    results = [rows.check_decode(q, batch, rule, rows.plan(1, splits)) for splits in (1, 2)]
    assert_close(results[1], results[0], 1e-6, 1e-6, "two splits")


@pytest.mark.parametrize("window", [1, 15, 16, 17, 63, 64, 65, 129])
def test_windows_begin_anywhere_in_a_page_or_tile(window: int) -> None:
    """Tiles begin below the window; what lies there is masked, in decode and in prefill."""
    case = AttentionCase(1, 1, 32, 16, 1, F32, window=window)
    rows, q, batch = decode_rows(case, 64, 65, 200)
    rows.check_decode(q, batch, case.rule(), rows.plan(3, 1))
    q, batch = rows.append({0: 1, 1: 70, 2: 1})
    rows.check_prefill(q, batch, case.rule())


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_a_cap_of_great_scores_does_not_overflow(softcap: float) -> None:
    """Scores of some thousands are capped, after the scale and before the mask."""
    rows, q, batch = decode_rows(AttentionCase(4, 1, 64, 16, 1, F32), 70, 5)
    out = rows.check_decode(q * 1000, batch, AttentionRule(1.0, softcap=softcap), rows.plan(2, 1))
    assert out.isfinite().all()


def test_queries_are_not_scaled_in_their_own_dtype() -> None:
    """A scale that float16 cannot hold works: it is applied to the float32 scores."""
    case = AttentionCase(1, 1, 64, 16, 1, F16)
    rows, q, batch = decode_rows(case, 70)
    rows.rows.kv.k *= 2000
    rows.check_decode(q * 2000, batch, AttentionRule(3e-8), rows.plan(1, 1))


def test_biases_of_far_tokens_are_exact() -> None:
    """They are counted from near the queries: counted from the first token they would leave no digits."""
    rows, q, batch = decode_rows(AttentionCase(1, 1, 64, 64, 1, F32), 4000)
    rule = AttentionRule(0.125, slopes=torch.tensor([0.5]))
    rows.check_decode(q, batch, rule, rows.plan(1, 1))
    q, batch = rows.append({0: 5})
    rows.check_prefill(q, batch, rule)


def test_weights_are_not_rounded_to_the_dtype_of_the_pages() -> None:
    """With float8 pages and float32 queries nothing but the pages is in float8."""
    rows, q, batch = decode_rows(AttentionCase(4, 1, 64, 16, 2, F32, stored=Float8KV), 300)
    rows.check_decode(q, batch, AttentionRule(0.01), rows.plan(1, 2))


@pytest.mark.parametrize("new_tokens", [1, 5])
def test_small_weights_of_int8_values_are_something_in_float16(new_tokens: int) -> None:
    """Many heads look at one key without a value above all: weights of the others, times the scales of their
    values, are less than float16 has. What comes out is of them alone.
    """
    case = AttentionCase(1, 1, 64, 16, 1, F16, stored=Int8KV)
    rows, rule = case.rows(), AttentionRule(1e-3, sinks=torch.tensor([9.5]))
    rows.append({0: 300})
    q, batch = rows.append({0: new_tokens})
    rows.rows.kv.v_scales *= 0.05
    out = torch.empty_like(q)
    if new_tokens == 1:
        decode_attention(q, rows.rows.kv, decode_batch(batch), BLOCK, rule, rows.plan(1, 1), out)
    else:
        prefill_attention(q, rows.rows.kv, prefill_batch(batch), BLOCK, rule, out)
    expected = reference_attention(
        q, rows.rows.kv, batch.origins, [(new_tokens, 300 + new_tokens)], BLOCK, rule
    )
    largest = expected.abs().max()
    assert_close(out / largest, expected / largest, TOLERANCE[F16], TOLERANCE[F16], "attention")


def test_pages_far_into_a_slab_are_found() -> None:
    """Page times page size is more than 32 bits hold."""
    page, length = 600_000, 5
    kv = sparse_pages(page, 16, 1, 256)
    near = PagedKV(*(torch.randn(2, 16, 1, 256) for _ in range(2)))
    kv.k[page], kv.v[page] = near.k[1], near.v[1]
    q, rule = torch.randn(1, 1, 256), AttentionRule(1 / 16)
    results = []
    for pages, origin in ((near, 1), (kv, page)):
        origins = torch.full((1, 16), origin - BLOCK, dtype=torch.int32)
        context_lens = torch.tensor([length], dtype=torch.int32)
        nothing = torch.zeros(1, dtype=torch.int32)
        batch = DecodeBatch(nothing, context_lens, origins, nothing, nothing)
        results.append(torch.full_like(q, torch.nan))
        plan = DecodePlan.create(1, 1, pages, 1, length)
        decode_attention(q, pages, batch, BLOCK, rule, plan, results[-1])
    assert torch.equal(results[0], results[1])


@triton.jit
def _slots_kernel(origins, block, start, end, out, PAGE: tl.constexpr, BN: tl.constexpr):
    tl.store(out + tl.arange(0, BN), tile_slots(origins, block, start, end, PAGE, BN))


@pytest.mark.parametrize(
    ("page", "start", "expected"),
    [
        (4, 0, [36, 37, 38, 39, 4, 5, 6, 7, *(0, 1, 2, 3) * 2]),  # a page of the row, then page 0
        (32, 16, [304, *range(305, 320)]),  # the second half of a page
        (6, 0, [*range(54, 60), *(0, 1, 2, 3, 4, 5), *(0, 1, 2, 3)]),  # pages that do not divide a tile
    ],
)
def test_tokens_past_the_end_have_a_place_in_real_memory(page: int, start: int, expected: list[int]) -> None:
    """Whatever the table holds there: they are masked, but addresses are computed from it."""
    origins = torch.tensor([7, -1, 2**30, 2**30], dtype=torch.int32)
    out = torch.full((16,), -1)
    _slots_kernel[(1,)](origins, 2, start, start + 6, out, PAGE=page, BN=16)
    assert out.tolist() == expected


@triton.jit
def _rounding_kernel(x, out, BN: tl.constexpr):
    places = tl.arange(0, BN)
    tl.store(out + places, rounded_to_bfloat16(tl.load(x + places)))


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    """Ties to even, in both directions, and none of the interpreter's own conversions."""
    x = torch.cat([torch.randn(61) * 100, torch.tensor([257.0, 259.0, -257.0])])
    out = torch.empty_like(x)
    _rounding_kernel[(1,)](x, out, BN=64)
    assert torch.equal(out, x.bfloat16().float())


def test_rows_may_share_pages() -> None:
    """Rows of one prefix, as beams have them, each read it."""
    rows, q, batch = decode_rows(AttentionCase(4, 1, 64, 16, 1, F32), 33, 20)
    batch.origins[1] = batch.origins[0]
    out = rows.check_decode(q[:1].repeat(2, 1, 1), batch, AttentionRule(0.125), rows.plan(2, 1))
    assert not torch.equal(out[0], out[1])


def test_a_result_does_not_depend_on_the_other_rows() -> None:
    """Bit for bit, with the same plan; rows of NaN and padding rows included."""
    rows, q, batch = decode_rows(AttentionCase(4, 1, 64, 16, 2, F32), 290, 20, 300)
    rule, plan = AttentionRule(0.125), rows.plan(3, 2)
    first = rows.check_decode(q, batch, rule, plan)
    q[1] = torch.nan
    second = torch.empty_like(q)
    device = decode_batch(batch)
    device.context_lens[0] = 0
    decode_attention(q, rows.rows.kv, device, BLOCK, rule, plan, second)
    assert (second[0] == 0).all() and second[1].isnan().all()
    assert torch.equal(second[2], first[2])


def test_one_new_token_is_the_same_in_prefill() -> None:
    """A row that decodes beside prompts gives what it gives among decoding rows."""
    rows, q, batch = decode_rows(AttentionCase(3, 2, 64, 16, 1, F32), 100, 17)
    rule = AttentionRule(0.125)
    decoded = rows.check_decode(q, batch, rule, rows.plan(2, 1))
    assert_close(rows.check_prefill(q, batch, rule), decoded, 1e-6, 1e-6, "prefill")


def test_launches_of_a_size_differ_in_nothing_that_a_graph_holds() -> None:
    """Grid, constants, numbers and addresses are the same for short and for long rows."""
    rows, q, batch = decode_rows(AttentionCase(4, 1, 64, 16, 2, F32), 1, 500)
    device, plan, out = decode_batch(batch), rows.plan(2, 16), torch.empty_like(q)
    recorded = []
    for lengths in ([1, 500], [0, 3]):
        device.context_lens.copy_(torch.tensor(lengths))
        with record_launches() as launches:
            decode_attention(q, rows.rows.kv, device, BLOCK, AttentionRule(0.125), plan, out)
        recorded.append(
            [
                (
                    launch.kernel,
                    launch.grid,
                    launch.constants,
                    [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in launch.arguments],
                )
                for launch in launches
            ]
        )
    assert recorded[0] == recorded[1]
    assert len(recorded[0]) == 2


def _decode(rows: AttentionRows, q: torch.Tensor, batch: object) -> None:
    decode_attention(
        q, rows.rows.kv, decode_batch(batch), BLOCK, AttentionRule(1.0), rows.plan(1, 1), q.clone()
    )


def _prefill(rows: AttentionRows, q: torch.Tensor, batch: object) -> None:
    prefill_attention(q, rows.rows.kv, prefill_batch(batch), BLOCK, AttentionRule(1.0), q.clone())


@interpreted
@pytest.mark.parametrize("attend", [_decode, _prefill])
def test_bfloat16_does_not_enter_the_interpreter(attend: Callable[..., None]) -> None:
    """It would multiply the raw bits."""
    rows, q, batch = decode_rows(AttentionCase(1, 1, 64, 16, 1, F32), 5)
    rows.rows.kv = PagedKV(*(slab.bfloat16() for slab in rows.rows.kv.slabs))
    with pytest.raises(EngineError, match="bfloat16"):
        attend(rows, q.bfloat16(), batch)
