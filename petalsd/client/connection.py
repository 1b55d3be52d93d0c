"""What the client asks of a connection to one server; sessions and passes are written against it.

``swarm.stub`` is the real one, tests bring their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

Metadata = Mapping[str, object]


class StepStream(Protocol):
    """An open ``rpc_inference`` stream. Failures are RemoteFailure or DeadlineExceeded."""

    async def send(self, uid: str, tensors: Sequence[torch.Tensor], metadata: Metadata, /) -> None: ...

    @property
    def has_arrived(self) -> bool:
        """Whether ``receive`` has something to say at once."""

    async def receive(self, timeout_s: float, /) -> list[torch.Tensor]:
        """NoAnswer when none came in time; to receive again is to wait on."""

    async def close(self) -> None:
        """End the session on the server too; never raises because the server is gone."""

    def abort(self) -> None:
        """Drop the stream at once."""


class Connection(Protocol):
    """One server. Failures are RemoteFailure or DeadlineExceeded."""

    @property
    def peer(self) -> str: ...

    async def is_silent(self, timeout_s: float, /) -> bool:
        """Whether it leaves a ping unanswered while others answer; never raises."""

    async def open_inference(self, timeout_s: float, /) -> StepStream: ...

    async def forward(
        self, uid: str, tensors: Sequence[torch.Tensor], metadata: Metadata, timeout_s: float, /
    ) -> list[torch.Tensor]: ...

    async def backward(
        self, uid: str, tensors: Sequence[torch.Tensor], metadata: Metadata, timeout_s: float, /
    ) -> list[torch.Tensor]: ...


class Connector(Protocol):
    """Gives the connection to a peer (base58 PeerID); dialing happens at its first use."""

    def __call__(self, peer: str, /) -> Connection: ...
