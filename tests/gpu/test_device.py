"""What only a GPU can show of the code around it: pinned copies, host memory, a lost device, the clock."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.gpu.clock import CudaClock
from petalsd.daemon.memory import device_memory_bytes
from petalsd.kvcache.host_store import HostStore
from petalsd.ops.staging import copying_to

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GPU = torch.device("cuda:0")


def test_weights_arrive_through_pinned_buffers() -> None:
    """More than both buffers hold, cast on the way."""
    source = torch.randn(40 << 20)
    target = torch.empty(len(source), dtype=torch.bfloat16, device=GPU)
    with copying_to(GPU) as copy:
        copy(target, source)
    assert torch.equal(target.cpu(), source.bfloat16())


def test_pages_come_back_from_host_memory() -> None:
    """In the order of the stream: pages are overwritten at once, and read at once."""
    slabs = tuple(torch.randn(300, 16, 8, 128, device=GPU).bfloat16() for _ in range(2))
    before = [slab.clone() for slab in slabs]
    store = HostStore(slabs, 200 * 2 * slabs[0][0].nbytes, piece_bytes=7 * 2 * slabs[0][0].nbytes)
    transfers = np.array([[3, 2, 90], [200, 120, 70]], dtype=np.int32)
    store.write(transfers)
    for slab in slabs:
        slab.zero_()
    store.read(transfers)
    for slab, old in zip(slabs, before, strict=True):
        assert torch.equal(slab[3:93], old[3:93])
        assert torch.equal(slab[200:270], old[200:270])
        assert not slab[93:200].any()


def test_a_real_fault_is_told_from_an_error() -> None:
    """An index outside a tensor asserts on the device; too much memory is one call's matter. In a process apart,
    for the device is lost to it.
    """
    code = """
import torch
from petalsd.device_faults import device_loss
try:
    torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
except RuntimeError as error:
    assert device_loss(error) is None, error
try:
    torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")].cpu()
except RuntimeError as error:
    loss = device_loss(error)
    assert loss is not None and loss.number == 710, repr(error)
    print("lost")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (0, "lost\n"), done.stderr


def test_memory_that_this_process_holds_counts() -> None:
    before = device_memory_bytes(GPU)
    held = torch.empty(1 << 28, dtype=torch.uint8, device=GPU)
    assert abs(device_memory_bytes(GPU) - before) < held.nbytes // 2


def test_the_clock_counts_and_times() -> None:
    """A chain of three operators is three kernels; a larger copy takes longer."""
    clock = CudaClock(GPU)
    x = torch.randn(1 << 20, device=GPU)
    assert clock.num_kernels(lambda: x.sin().cos().tan()) == 3
    small, large = (
        min(clock.seconds(lambda size=size: torch.empty(size, device=GPU).fill_(1.0), 20))
        for size in (1 << 20, 1 << 27)
    )
    assert 0 < small < large
