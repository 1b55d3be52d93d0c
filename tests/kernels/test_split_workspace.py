"""How products are divided among programs."""

from __future__ import annotations

import pytest
import torch

from petalsd.ops import dense_linear, quantized_linear
from petalsd.ops.launching import Options, record_launches
from petalsd.ops.packed_weight import WeightFormat
from petalsd.ops.quantized_product import QuantizedProduct
from petalsd.ops.split_workspace import (
    PROGRAMS_PER_MULTIPROCESSOR,
    VALUES_PER_MULTIPROCESSOR,
    ProductTile,
    SplitWorkspace,
    StreamWorkspaces,
    tile_for,
)
from petalsd.ops.weight_packing import pack_weight
from tests.device import DEVICE

TILE = ProductTile(16, 64, 128, Options(), programs=4)
USED = [
    *dense_linear.TILES,
    *quantized_linear.TILES[4],
    *quantized_linear.TILES[8],
    quantized_linear.FLOAT32_TILE,
]


@pytest.mark.parametrize("tile", USED)
def test_there_is_room_for_the_parts_of_every_tile(tile: ProductTile) -> None:
    """Its programs on one multiprocessor, as many as are ever wanted of it."""
    assert tile.programs <= PROGRAMS_PER_MULTIPROCESSOR
    assert tile.programs * tile.rows * tile.outputs <= VALUES_PER_MULTIPROCESSOR


def test_splits_fill_the_device_and_fit_the_workspace() -> None:
    """Few tiles are split, many are not, and parts are never more than there is room for."""
    used = SplitWorkspace.allocate(DEVICE, 132)
    many, few = 64 * TILE.inputs, 9 * TILE.inputs
    for num_tiles in (0, 1, 16, 64, 100, 132, 264, 265, 528, 4000):
        splits = used.num_splits(TILE, num_tiles, many)
        assert splits == 1 or splits * num_tiles * TILE.rows * TILE.outputs <= len(used.partials)
        assert splits == 1 or num_tiles <= len(used.arrivals)
        assert splits in (1, 2, 4, 8, 16)
    found = [used.num_splits(TILE, num_tiles, many) for num_tiles in (16, 64, 528)]
    assert found == [16, 8, 1]
    assert used.num_splits(TILE, 16, few) == 2, "a split has at least four pieces"


def test_the_smallest_tile_with_enough_rows_is_taken() -> None:
    """And the largest for all beyond."""
    tiles = [ProductTile(rows, 64, 128, Options(), programs=1) for rows in (8, 16, 64)]
    assert [tile_for(rows, tiles).rows for rows in (1, 8, 9, 16, 17, 64, 65)] == [8, 8, 16, 16, 64, 64, 64]


def test_each_stream_has_its_own() -> None:
    """What runs at the same time shares nothing; what follows each other on a stream shares all."""
    stream = 1
    workspaces = StreamWorkspaces(DEVICE, 4, lambda: stream)
    first = workspaces.current()
    stream = 2
    second = workspaces.current()
    assert second.partials.data_ptr() != first.partials.data_ptr()
    assert second.arrivals.data_ptr() != first.arrivals.data_ptr()
    stream = 1
    assert workspaces.current() is first
    assert first.current() is first


def test_products_ask_for_the_streams_workspace() -> None:
    """At each launch anew."""
    streams = [1]
    workspaces = StreamWorkspaces(DEVICE, 64, lambda: streams[-1])
    weight = pack_weight(torch.randn(64, 1024, device="cpu"), WeightFormat.INT8)
    product = QuantizedProduct(weight.to(DEVICE), workspaces)
    used = []
    for stream in (1, 2, 1):
        streams.append(stream)
        with record_launches() as launches:
            product.multiply(torch.randn(1, 1024))
        used += [one.arguments[5] is workspaces.current().partials for one in launches]
    assert used == [True] * 3
