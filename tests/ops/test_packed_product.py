"""Products over packed weights: those of ``ops.linear`` but for rounding, for any rows and from any thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from petalsd import _C
from petalsd.errors import KVPoolError
from petalsd.ops.linear import linear
from petalsd.ops.packed_product import PackedProduct
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.weight_packing import pack_weight
from tests.numeric import assert_close

NUM_OUT, NUM_IN = 40, 150  # no multiples of a tile and of a group
DTYPES = [torch.float32, torch.bfloat16]
# Of activations, relative to the norm of the product.
ROUNDING = {
    WeightFormat.FLOAT32: 1e-5,
    WeightFormat.BFLOAT16: 0.004,
    WeightFormat.INT8: 0.012,
    WeightFormat.INT4: 0.012,
}


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture(params=[1, 3], ids="{}-threads".format, scope="module")
def team(request: pytest.FixtureRequest) -> _C.LayerTeam:
    return _C.LayerTeam(request.param, "auto")


@pytest.fixture(params=list(WeightFormat))
def weight(request: pytest.FixtureRequest) -> PackedWeight:
    return pack_weight(drawn(NUM_OUT, NUM_IN), request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(NUM_IN,), (1, NUM_IN), (2, 5, NUM_IN), (300, NUM_IN), (0, NUM_IN)], ids=str
)
def test_products_are_near_exact_ones(
    weight: PackedWeight, team: _C.LayerTeam, shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype
) -> None:
    """For one row, sequences, more rows than the kernels take at once, and none; in the dtype of the rows."""
    x, bias = drawn(*shape, dtype=dtype), drawn(NUM_OUT, dtype=dtype) if has_bias else None
    with torch.inference_mode():
        product = PackedProduct(weight, team).multiply(x, bias)
        expected = linear(x.float(), weight, None if bias is None else bias.float())
    assert (product.dtype, product.shape) == (dtype, expected.shape)
    bound = ROUNDING[weight.format] + (0.003 if dtype == torch.bfloat16 else 0.0)
    assert (product.float() - expected).norm() <= bound * expected.norm()


def test_gradients_are_those_of_the_unpacked_weight(weight: PackedWeight, team: _C.LayerTeam) -> None:
    """Where one is asked for, nothing is rounded but the weight, and the product can be changed in place."""
    x = drawn(2, 5, NUM_IN).requires_grad_()
    product = PackedProduct(weight, team).multiply(x, drawn(NUM_OUT))
    product += 1.0
    product.sum().backward()
    assert x.grad is not None
    expected = weight.unpack(torch.float32)
    assert_close(product, x.detach() @ expected.t() + drawn(NUM_OUT) + 1.0, 1e-4, 1e-5, "product")
    assert_close(x.grad, expected.sum(dim=0).expand(2, 5, -1), 1e-4, 1e-5, "gradient")


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((NUM_IN, 8), lambda x: x.t()),
        ((8, 2 * NUM_IN), lambda x: x[:, ::2]),
        ((8, NUM_IN + 3), lambda x: x[2:, 3:]),
        ((1, NUM_IN), lambda x: x.expand(4, -1)),
    ],
    ids=["transposed", "strided", "sliced", "expanded"],
)
def test_rows_may_lie_anyhow_in_memory(
    weight: PackedWeight,
    team: _C.LayerTeam,
    shape: tuple[int, int],
    view: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """As attention and slices of wider products leave them."""
    x, product = view(drawn(*shape)), PackedProduct(weight, team)
    assert not x.is_contiguous()
    assert torch.equal(product.multiply(x), product.multiply(x.contiguous()))


def test_rows_of_another_width_are_refused(weight: PackedWeight, team: _C.LayerTeam) -> None:
    """Also when their values would make up other rows of the right width."""
    with pytest.raises(ValueError, match="x has 75 inputs, the weight has 150"):
        PackedProduct(weight, team).multiply(drawn(4, 75))


def test_a_team_serves_many_threads(weight: PackedWeight, team: _C.LayerTeam) -> None:
    """A block is tried while others serve: calls of several threads, of several sizes, keep apart."""
    products = [PackedProduct(weight, team), PackedProduct(pack_weight(drawn(70, 300), weight.format), team)]
    inputs = [drawn(200, NUM_IN), drawn(9, 300)]
    expected = [product.multiply(x) for product, x in zip(products, inputs, strict=True)]

    def repeat(which: int) -> bool:
        return all(torch.equal(products[which].multiply(inputs[which]), expected[which]) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, [0, 1, 0, 1]))


def test_a_product_takes_what_its_weight_does(weight: PackedWeight, team: _C.LayerTeam) -> None:
    """Nothing is held beside the packed weight."""
    assert PackedProduct(weight, team).nbytes == weight.nbytes


def test_kernels_can_be_forced() -> None:
    """Every processor has the baseline; the name of a tier that there is none of is refused."""
    weight, x = pack_weight(drawn(NUM_OUT, NUM_IN), WeightFormat.FLOAT32), drawn(3, NUM_IN)
    team = _C.LayerTeam(1, "baseline")
    assert team.tier == "baseline"
    assert_close(PackedProduct(weight, team).multiply(x), linear(x, weight), 1e-4, 1e-5, "product")
    with pytest.raises(KVPoolError, match="tier = sse9: one of auto"):
        _C.LayerTeam(1, "sse9")
