"""What the KV pool tells whoever measures it."""

from __future__ import annotations

from typing import Protocol


class PoolObserver(Protocol):
    """Called on the engine thread. Must be quick, and must not raise."""

    def copied(self, num_shared: int, num_moved: int) -> None:
        """Pages were copied: before a write to pages that rows share, and to make room for a run."""

    def spilled(self, num_bytes: int, seconds: float) -> None:
        """Pages of idle sessions were written to the spill file."""

    def restored(self, num_bytes: int, seconds: float) -> None:
        """Pages were read back for sessions whose step is on."""

    def spill_failed(self) -> None:
        """The spill file could not be made, written or read."""


class NullPoolObserver:
    """Looks away."""

    def copied(self, num_shared: int, num_moved: int) -> None:
        pass

    def spilled(self, num_bytes: int, seconds: float) -> None:
        pass

    def restored(self, num_bytes: int, seconds: float) -> None:
        pass

    def spill_failed(self) -> None:
        pass
