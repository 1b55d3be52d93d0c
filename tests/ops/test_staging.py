"""Staged copies: every byte arrives, buffers under way are not touched, and the memory is bounded."""

from __future__ import annotations

import torch

from petalsd.ops.staging import StagedCopies, copying_to


class SlowLane:
    """A device that copies a buffer as late as it may: when it is waited for. ``busy`` is under way."""

    def __init__(self) -> None:
        self.pinned_bytes = 0
        self.busy: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.most_busy = 0
        self._num_sent = 0

    def pin(self, nbytes: int) -> torch.Tensor:
        self.pinned_bytes += nbytes
        return torch.empty(nbytes, dtype=torch.uint8)

    def send(self, target: torch.Tensor, buffer: torch.Tensor) -> int:
        self._num_sent += 1
        self.busy[self._num_sent] = (target, buffer)
        self.most_busy = max(self.most_busy, len(self.busy))
        return self._num_sent

    def wait(self, receipt: int) -> None:
        target, buffer = self.busy.pop(receipt)
        target.copy_(buffer)


def test_pieces_arrive_whole_and_cast() -> None:
    """Tensors smaller and larger than a buffer, of another dtype and not contiguous, one after the other."""
    lane = SlowLane()
    copies = StagedCopies(lane, buffer_bytes=256)
    generator = torch.Generator().manual_seed(0)
    sources = [
        torch.randn(3, generator=generator),
        torch.randn(40, 50, generator=generator),
        torch.randn(50, 40, generator=generator).t(),
        torch.randn(64, generator=generator, dtype=torch.float64),
        torch.empty(0),
    ]
    targets = [torch.full(source.shape, torch.nan, dtype=torch.bfloat16) for source in sources]
    for target, source in zip(targets, sources, strict=True):
        copies.copy(target, source)
    copies.finish()
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.to(torch.bfloat16))
    assert (lane.busy, lane.most_busy) == ({}, 2)


def test_two_buffers_are_all_that_is_pinned() -> None:
    """However much is copied; a small model pins one."""
    lane = SlowLane()
    copies = StagedCopies(lane, buffer_bytes=1024)
    copies.copy(torch.empty(8), torch.ones(8))
    assert lane.pinned_bytes == 1024
    copies.copy(torch.empty(100_000), torch.ones(100_000))
    copies.finish()
    assert lane.pinned_bytes == 2048


def test_the_processor_needs_no_staging() -> None:
    target = torch.empty(4, dtype=torch.float16)
    with copying_to(torch.device("cpu")) as copy:
        copy(target, torch.arange(4.0))
    assert target.tolist() == [0, 1, 2, 3]
