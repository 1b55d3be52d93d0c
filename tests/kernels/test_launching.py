"""What is refused before it reaches a kernel, and what is noted of a launch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from petalsd.errors import EngineError
from petalsd.ops.add_norm import add_norm
from petalsd.ops.launching import Launch, Options, check_tensor, launch, record_launches, strides
from petalsd.ops.norm import Norm
from tests.device import interpreted


def storage(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (storage(4, 40)[:, :32], "multiples of 16"),
        (storage(32, 4).t(), "the last must be 1"),
        (storage(4, 48)[:, 1:33], "no multiple of 16 bytes"),
        (storage(4, 16), r"shape \[4, 16\]: it must be \[any, 32\]"),
        (storage(128), "shape"),
        (storage(4, 32).half(), "it must be torch.float32"),
    ],
)
def test_a_tensor_that_kernels_cannot_use_is_refused(tensor: torch.Tensor, reason: str) -> None:
    """By its shape, dtype, strides and address; the message names the tensor."""
    with pytest.raises(ValueError, match=rf"^hidden.*{reason}"):
        check_tensor("hidden", tensor, (None, 32), torch.float32)


def test_a_dimension_of_one_element_may_have_any_stride() -> None:
    """Its stride is never used; kernels are given what a longer one would have."""
    row = storage(4, 40)[:1, :32]
    check_tensor("hidden", row, (1, 32))
    assert strides(row) == (32,)
    assert strides(storage(5, 3, 2, 16)) == (96, 32, 16)
    assert strides(storage(5, 3, 2, 16)[:, :, :1]) == (96, 32, 16)


def test_launches_are_recorded_and_run() -> None:
    """The record holds what the kernel was given; afterwards nothing is noted any more."""
    norm, residual, out = Norm(torch.ones(32), 1e-5), torch.ones(2, 32), torch.zeros(2, 32)
    with record_launches() as launches:
        add_norm(None, residual, norm, out)
    add_norm(None, residual, norm, out)
    assert [(one.grid, one.constants["WIDTH"], one.arguments[1] is residual) for one in launches] == [
        ((2,), 32, True)
    ]
    assert torch.allclose(out, torch.ones(2, 32))


def test_launches_without_memory_are_only_recorded() -> None:
    """On the device "meta" a launch ends in the record, whatever its dtype."""
    norm = Norm(torch.ones(32, device="meta", dtype=torch.bfloat16), 1e-5)
    hidden = torch.empty(2, 32, device="meta", dtype=torch.bfloat16)
    with record_launches() as launches:
        add_norm(None, hidden, norm, hidden)
    assert len(launches) == 1


def test_nothing_is_launched_for_no_rows() -> None:
    """An empty batch is no error, and no launch."""
    empty = torch.empty(0, 32)
    with record_launches() as launches:
        add_norm(empty, empty, Norm(torch.ones(32), 1e-5), empty)
    assert launches == []


def test_a_compiled_kernel_on_the_host_is_an_error_that_says_why() -> None:
    """Only interpreted kernels reach memory of the host."""
    compiled = SimpleNamespace(__name__="norm_kernel")
    with pytest.raises(EngineError, match="norm_kernel cannot run on cpu: kernels need a CUDA device"):
        launch(compiled, (1,), [torch.zeros(1, device="cpu")], {}, Options())
    with pytest.raises(EngineError):
        Launch(compiled, (1,), (torch.zeros(1, device="meta"),), {}, Options()).run()


@interpreted
def test_bfloat16_is_kept_out_of_the_interpreter() -> None:
    """It multiplies their raw bits in dot products, and says nothing."""
    halves = torch.ones(2, 32, dtype=torch.bfloat16)
    with pytest.raises(EngineError, match="bfloat16"):
        add_norm(None, halves, Norm(halves[0], 1e-5), halves.clone())
