"""Batches as they are staged for a device: the same rows as on the CPU, in one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from petalsd.engine.batch import BatchItem, build_batch, select_items
from petalsd.engine.staging import Staged
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.sizing import KVGeometry
from petalsd.ops.decode_batch import DecodeLayout, KernelRows, bucket_of, kernel_rows
from petalsd.ops.ragged import RaggedBatch
from tests.engine.rig import CPU
from tests.engine.test_batch import make_items

MAX_RUNS = 16
DECODES = [(2, 3, 1), (1, 8, 1), (3, 0, 1)]  # (rows, start, tokens) of each session
MIXED = [(2, 12, 1), (1, 0, 1), (2, 3, 6), (1, 5, 9)]


async def staged(shapes: list[tuple[int, int, int]]) -> tuple[KVPool, list[BatchItem]]:
    pool = KVPool(KVGeometry(4, 1, 16, torch.float32), 2000, torch.float32, CPU)
    pool.allocate()
    return pool, await make_items(pool, shapes)


def assert_same_rows(actual: RaggedBatch, expected: RaggedBatch) -> None:
    assert (actual.token_bounds, actual.context_lens) == (expected.token_bounds, expected.context_lens)
    for name in ("positions", "write_origins", "write_offsets"):
        assert getattr(actual, name).dtype == torch.int32
        assert getattr(actual, name).tolist() == getattr(expected, name).tolist(), name
    for row, context in enumerate(expected.context_lens):
        runs = -(-context // 4)
        assert torch.equal(actual.origins[row, :runs], expected.origins[row, :runs])


def described(rows: KernelRows) -> Sequence[object]:
    """Everything but what is undefined."""
    parts = [rows.places.positions, rows.places.write_origins, rows.places.write_offsets]
    for batch in (rows.decode, rows.prefill):
        if batch is not None:
            parts += [batch.positions, batch.context_lens, batch.write_origins, batch.write_offsets]
    starts = [] if rows.prefill is None else rows.prefill.row_starts.tolist()
    return [*(part.tolist() for part in parts), starts]


@pytest.mark.parametrize("shapes", [DECODES, MIXED])
async def test_a_staged_batch_has_the_rows_of_one_on_the_cpu(shapes: list[tuple[int, int, int]]) -> None:
    """As ragged tensors, and as kernels take them."""
    pool, items = await staged(shapes)
    batch, _ = Staged(CPU, MAX_RUNS).build(items, pool, [])
    expected = build_batch(items, pool)
    assert_same_rows(batch.ragged, expected.ragged)
    assert (batch.item_tokens, batch.item_rows) == (expected.item_tokens, expected.item_rows)
    assert batch.ragged.kernel_rows is not None
    assert described(batch.ragged.kernel_rows) == described(kernel_rows(expected.ragged))
    for part in (batch.ragged.kernel_rows.decode, batch.ragged.kernel_rows.prefill):
        if part is not None:
            assert part.origins.stride(0) % 16 == 0 and part.context_lens.data_ptr() % 16 == 0


async def test_parts_come_in_the_same_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of other blocks are batches of their own: their tokens are found in the whole."""
    pool, items = await staged(MIXED)
    copies = []
    to = torch.Tensor.to

    def counting(tensor: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        copies.append(tensor.numel())
        return to(tensor, *args, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch.Tensor, "to", counting)
    _, parts = Staged(CPU, MAX_RUNS).build(items, pool, [(0, 1), (1, 3)])
    monkeypatch.undo()
    assert len(copies) == 1
    whole = build_batch(items, pool)
    for part, chosen in zip(parts, [(0, 1), (1, 3)], strict=True):
        expected, tokens = select_items(whole, chosen)
        assert_same_rows(part.ragged, expected)
        assert torch.equal(part.tokens, tokens)


async def test_single_tokens_are_packed_with_padding_up_to_a_bucket() -> None:
    """What graphs read is in one piece; padding rows have no context and are written nowhere."""
    pool, items = await staged(DECODES)
    batch, _ = Staged(CPU, MAX_RUNS).build(items, pool, [])
    rows = batch.ragged.kernel_rows
    assert rows is not None and rows.packed is not None
    assert bucket_of(6) == 8
    packed = DecodeLayout(8, MAX_RUNS).batch(rows.packed)
    assert packed.context_lens.tolist() == [4, 4, 9, 1, 1, 1, 0, 0]
    assert packed.write_offsets.tolist() == [3, 3, 0, 0, 0, 0, -1, -1]
    assert packed.positions[6:].tolist() == packed.write_origins[6:].tolist() == [0, 0]
    assert packed.origins[6:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("shapes", "max_runs"),
    [(MIXED, 16), ([(2, 36, 1)], 0), ([(65, 0, 1)], 16)],
    ids=["prefill", "runs", "rows"],
)
async def test_what_graphs_have_no_room_for_is_not_packed(
    shapes: list[tuple[int, int, int]], max_runs: int
) -> None:
    pool, items = await staged(shapes)
    batch, _ = Staged(CPU, max_runs).build(items, pool, [])
    assert batch.ragged.kernel_rows is not None and batch.ragged.kernel_rows.packed is None
