"""hivemind's books of the unary calls through p2pd, so that calls which are given up do no harm.

It answers a call by its future without looking whether that was cancelled a moment ago. The error would end the
task that reads all answers, and with it every call until the node is made anew. And it forgets the tasks of
requests that were answered, but not of those that the peer cancelled.
"""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from hivemind.p2p import P2P


class PendingCalls(dict[UUID, "asyncio.Future[Any]"]):
    """Our calls by their ids; those that nobody waits for any more are not in it, though their keys are."""

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id) if isinstance(call_id, UUID) else None
        return future is not None and not future.done()


class HandlerTasks(dict[UUID, "asyncio.Task[Any]"]):
    """What computes answers to others, by their calls' ids, until it is done."""

    def __setitem__(self, call_id: UUID, task: asyncio.Task[Any]) -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda _: self.pop(call_id, None))


def keep_books(p2p: P2P) -> None:
    """For a connection that was just made."""
    control = p2p._client.control
    control._pending_calls, control._handler_tasks = PendingCalls(), HandlerTasks()
