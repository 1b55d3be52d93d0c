"""Keys and values of one session in a portable order: out of its pages, and into those of another engine.

A *chunk* is some tokens of all rows in one block: keys and values ``[B, n, Hkv, D]`` each, token by token, in the
model's dtype on the CPU, whatever the order and precision of the pages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from petalsd.errors import EngineError
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVSession

KeysValues: TypeAlias = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """Tokens ``start`` to ``end - 1`` of all rows in ``block``, one of the session's; ``start < end``."""

    block: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """One chunk on its way; ``run`` belongs to the engine thread, between two batches."""

    run: Callable[[KVPool], KeysValues | None]
    answer: asyncio.Future[Any]

    @classmethod
    def reading(cls, kv: KVSession, place: Place, answer: asyncio.Future[Any]) -> Transfer:
        """Answers the chunk at ``place``, which the session holds."""
        return cls(partial(_read, kv, place), answer)

    @classmethod
    def writing(cls, kv: KVSession, place: Place, chunk: KeysValues, answer: asyncio.Future[Any]) -> Transfer:
        """Puts the chunk at ``place``, mapping pages for it."""
        return cls(partial(_write, kv, place, chunk), answer)


def _read(kv: KVSession, place: Place, pool: KVPool) -> KeysValues:
    slots = _slots(kv, place, kv.length, pool)
    keys, values = pool.kv.gather(slots)
    shape = kv.batch, place.end - place.start, *keys.shape[1:]
    return keys.view(shape).cpu(), values.view(shape).cpu()


def _write(kv: KVSession, place: Place, chunk: KeysValues, pool: KVPool) -> None:
    length = max(kv.length, place.end)
    slots = _slots(kv, place, length, pool)
    keys, values = (part.flatten(0, 1).to(pool.device, pool.dtype) for part in chunk)
    with torch.inference_mode():
        pool.kv.write(slots, keys, values)


def _slots(kv: KVSession, place: Place, length: int, pool: KVPool) -> torch.Tensor:
    """``[B * n]`` int64 on the pool's device: where these tokens lie, with the pages in memory for ``length``."""
    room = pool.make_room([(kv, length)])
    if room.failed:
        raise room.failed[0]
    if not room.ready:
        raise EngineError("the session's pages do not fit into memory now")
    kv.extend(length)
    pool.apply_copies()
    page_tokens = pool.kv.page_tokens
    origins = np.empty((kv.batch, -(-length // page_tokens)), dtype=np.int32)
    pool.fill_origins([kv], torch.from_numpy(origins))
    positions = np.arange(place.start, place.end)
    pages = origins[:, positions // page_tokens].astype(np.int64) + place.block
    slots = pages * page_tokens + positions % page_tokens
    return torch.from_numpy(slots.reshape(-1)).to(pool.device)
