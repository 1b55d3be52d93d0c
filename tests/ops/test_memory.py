"""Memory for weights and keys and values: usable like torch's own, aligned, returned when nobody holds it."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from petalsd.ops.memory import Arena, empty

CPU = torch.device("cpu")
HUGE_PAGE = 2 << 20
LARGE = (5, 1000, 300)  # 6 MB of float32: two huge pages and a rest


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping around this address; none when nothing is mapped there."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if "-" in key:
            start, end = (int(border, 16) for border in key.split("-"))
            is_inside = start <= address < end
        elif is_inside and key == "VmFlags:":
            return values
    return []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (7, 11), LARGE, (0, 4)])
def test_it_is_a_tensor_like_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Shape, dtype and content are torch's, on both sides of the size from which pages are huge."""
    tensor = empty(shape, dtype, CPU)
    expected = torch.randn(shape).to(dtype)
    tensor.copy_(expected)
    assert tensor.is_contiguous()
    assert torch.equal(tensor, expected)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux: huge pages on request")
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)
def test_large_memory_asks_for_huge_pages() -> None:
    """It starts at a huge page, and the kernel knows that it wants them."""
    tensor = empty(LARGE, torch.float32, CPU)
    assert tensor.data_ptr() % HUGE_PAGE == 0
    assert "hg" in flags_at(tensor.data_ptr())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux: /proc/self/smaps")
def test_memory_goes_back_with_the_last_view() -> None:
    """A view keeps it mapped; without one it is unmapped."""
    tensor = empty(LARGE, torch.float32, CPU)
    view = tensor[2]
    address = view.data_ptr()
    del tensor
    view.zero_()
    flags = flags_at(address)
    assert flags
    del view
    gc.collect()
    assert flags_at(address) != flags


def test_an_arena_is_cut_into_aligned_tensors() -> None:
    """Tensors start at cache lines and don't overlap; what the arena was made for fits."""
    shapes = [(3,), (5, 7), (64,), (1, 1)]
    dtypes = [torch.bfloat16, torch.float32, torch.uint8, torch.bfloat16]
    wanted = list(zip(shapes, dtypes, strict=True))
    nbytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in wanted)
    arena = Arena(nbytes, len(shapes), CPU)
    tensors = [arena.empty(shape, dtype) for shape, dtype in wanted]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, wanted, strict=True)):
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert tensor.data_ptr() % 64 == 0
        assert (tensor == number).all()


def test_an_arena_has_an_end() -> None:
    """What doesn't fit is refused, with both sizes."""
    arena = Arena(40, 1, CPU)
    arena.empty((10,), torch.float32)
    with pytest.raises(ValueError, match="room for 40 bytes, not for 68"):
        arena.empty((17,), torch.float32)
