"""Copies weights to a GPU through page-locked buffers: reading and casting the next piece overlaps the transfer.

From memory that is mapped from a file the driver copies piece by piece, and nothing overlaps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeAlias, TypeVar

import torch

Copy: TypeAlias = Callable[[torch.Tensor, torch.Tensor], object]
"""``copy(target, source)``: ``source``, on the host, cast into ``target``, of the same shape and contiguous."""

_BUFFER_BYTES = 32 << 20
_NUM_BUFFERS = 2

Receipt = TypeVar("Receipt")


class Lane(Protocol[Receipt]):
    """A way to the device on which copies are made in order, beside what the host does."""

    def pin(self, nbytes: int) -> torch.Tensor:
        """Page-locked host memory, ``[nbytes]`` uint8."""

    def send(self, target: torch.Tensor, buffer: torch.Tensor) -> Receipt:
        """Begin to copy ``buffer``, which must not change until ``wait`` has returned for the receipt."""

    def wait(self, receipt: Receipt) -> None: ...


class StagedCopies(Generic[Receipt]):
    """Two buffers of ``buffer_bytes`` take turns; ``finish`` must be called before a target is used."""

    def __init__(self, lane: Lane[Receipt], buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._lane = lane
        self._buffer_bytes = buffer_bytes
        self._buffers: list[torch.Tensor] = []
        self._sent: list[Receipt | None] = [None] * _NUM_BUFFERS
        self._turn = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """As ``Copy``; ``target`` is on the lane's device."""
        elements = self._buffer_bytes // target.itemsize
        places, values = target.view(-1), source.reshape(-1)
        for start in range(0, len(places), elements):
            self._send(places[start : start + elements], values[start : start + elements])

    def finish(self) -> None:
        """Wait until everything has arrived."""
        for number in range(_NUM_BUFFERS):
            self._await(number)

    def _send(self, place: torch.Tensor, piece: torch.Tensor) -> None:
        number = self._turn
        self._turn = (number + 1) % _NUM_BUFFERS
        self._await(number)
        if number == len(self._buffers):
            self._buffers.append(self._lane.pin(self._buffer_bytes))
        staged = self._buffers[number][: place.nbytes].view(place.dtype)
        staged.copy_(piece)
        self._sent[number] = self._lane.send(place, staged)

    def _await(self, number: int) -> None:
        receipt, self._sent[number] = self._sent[number], None
        if receipt is not None:
            self._lane.wait(receipt)


class CudaLane:
    """``Lane`` on a GPU: a stream of its own. torch keeps page-locked memory that is given up for the next one."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pin(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def send(self, target: torch.Tensor, buffer: torch.Tensor) -> torch.cuda.Event:
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # What is copied to may have been in use, before it was freed, on the stream that it was allocated on.
        self._stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(self._stream):
            target.copy_(buffer, non_blocking=True)
            arrived.record()
        return arrived

    def wait(self, receipt: torch.cuda.Event) -> None:
        receipt.synchronize()


@contextlib.contextmanager
def copying_to(device: torch.device) -> Iterator[Copy]:
    """The way to copy tensors to ``device``; they are there when the context ends."""
    if device.type != "cuda":
        yield torch.Tensor.copy_
        return
    copies = StagedCopies(CudaLane(device))
    try:
        yield copies.copy
    finally:
        copies.finish()
