"""Page-locked host memory for pages of idle sessions of a GPU, nearer than the disk.

Copies need no wait: they are made on the current stream, after the kernels that wrote the pages and before those
that read them again, and the host itself never looks at what lies here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from petalsd.errors import SpillError

# Page-locking takes a quarter of a second per GiB, so the memory is taken as it is used, in pieces.
_PIECE_BYTES = 64 << 20

Transfers = npt.NDArray[np.int32]
"""``[n, 3]``: page, slot, pages."""


class HostStore:
    """Room for as many pages of ``slabs``, ``[N, ...]`` each, contiguous, as fit ``max_bytes``: its slots."""

    def __init__(
        self, slabs: Sequence[torch.Tensor], max_bytes: int, piece_bytes: int = _PIECE_BYTES
    ) -> None:
        page_bytes = sum(slab[0].nbytes for slab in slabs)
        self.num_slots = max_bytes // page_bytes
        self._slabs = tuple(slabs)
        self._piece_slots = max(1, min(self.num_slots, piece_bytes // page_bytes))
        self._pieces: dict[int, list[torch.Tensor]] = {}

    @property
    def allocated_bytes(self) -> int:
        """Also while another thread takes a piece."""
        return sum(part.nbytes for parts in tuple(self._pieces.values()) for part in parts)

    def write(self, transfers: Transfers) -> None:
        """Copy pages here. SpillError when the system does not lock more memory."""
        for page, slot, parts in self._runs(transfers):
            for slab, part in zip(self._slabs, parts, strict=True):
                part[slot[0] : slot[1]].copy_(slab[page[0] : page[1]], non_blocking=True)

    def read(self, transfers: Transfers) -> None:
        """Copy pages back."""
        for page, slot, parts in self._runs(transfers):
            for slab, part in zip(self._slabs, parts, strict=True):
                slab[page[0] : page[1]].copy_(part[slot[0] : slot[1]], non_blocking=True)

    def _runs(
        self, transfers: Transfers
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int], list[torch.Tensor]]]:
        """First and end of the pages and of their slots within a piece, and the piece; cut where pieces end."""
        for page, slot, count in transfers.tolist():
            done = 0
            while done < count:
                number, first = divmod(slot + done, self._piece_slots)
                many = min(count - done, self._piece_slots - first)
                yield (page + done, page + done + many), (first, first + many), self._piece(number)
                done += many

    def _piece(self, number: int) -> list[torch.Tensor]:
        if number not in self._pieces:
            self._pieces[number] = [self._lock(slab) for slab in self._slabs]
        return self._pieces[number]

    def _lock(self, slab: torch.Tensor) -> torch.Tensor:
        shape = (self._piece_slots, *slab.shape[1:])
        try:
            return torch.empty(shape, dtype=slab.dtype, pin_memory=slab.is_cuda)
        except RuntimeError as error:
            raise SpillError(
                f"host memory cannot be page-locked: {str(error).partition(chr(10))[0]}"
            ) from error
