"""What the tasks of a loop wait for, as a text for a test that waited in vain."""

from __future__ import annotations

import asyncio
from typing import Any


async def whereabouts() -> str:
    """A line for each other task of the loop: where its coroutine stands, what that awaits, and so on."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return "\n".join(f"{task.get_name()}: {_chain(task.get_coro())}" for task in others)


def _chain(awaited: Any) -> str:
    places = []
    while (frame := getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)) is not None:
        places.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return " > ".join([*places, repr(awaited)])
