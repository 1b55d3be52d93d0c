"""Keys and values of one session in a portable order: out of its pages, and into those of another engine.

A *chunk* is some tokens of all rows in some blocks: keys and values ``[blocks, B, n, Hkv, D]`` each, token by
token, in the model's dtype on the CPU, whatever the order and precision of the pages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import structlog
import torch

from petalsd.device_faults import device_loss
from petalsd.engine.session import EngineSession
from petalsd.engine.step import SessionSpec, Step
from petalsd.errors import EngineError
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVSession
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

KeysValues: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_CHUNK_BYTES = 1 << 20  # of keys, and of values: small beside what a session's step may bring


@dataclass(frozen=True, slots=True)
class Place:
    """Tokens ``start`` to ``end - 1`` of all rows in ``blocks``, of the session's; ``start < end``."""

    blocks: BlockSpan
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Chunks:
    """How a session's tokens are cut, so that others wait for little at a time.

    ``token_bytes``: the keys of a token in one block and row.
    """

    spec: SessionSpec
    token_bytes: int

    @property
    def tokens_at_once(self) -> int:
        """Of one block, or over several together; at least one, however large it is."""
        return max(1, _CHUNK_BYTES // (self.spec.batch * self.token_bytes))

    def places(self, tokens: range) -> Iterator[Place]:
        """The chunks of these tokens, as few as their size allows: whole blocks side by side, or one in parts."""
        if not tokens:
            return
        span, at_once = self.spec.span, self.tokens_at_once
        num_blocks = max(1, at_once // len(tokens))
        for first in range(span.start, span.end, num_blocks):
            blocks = BlockSpan(first, min(first + num_blocks, span.end))
            for start in range(tokens.start, tokens.stop, at_once):
                yield Place(blocks, start, min(tokens.stop, start + at_once))

    def is_one(self, tokens: range) -> bool:
        """Whether these tokens of all blocks go at once."""
        return len(tokens) * len(self.spec.span) <= self.tokens_at_once


@dataclass(frozen=True, slots=True)
class Transfer:
    """One chunk on its way; ``run`` belongs to the engine thread, between two batches.

    After a SpillError of it the session's pages may hold anything, after one that is no PetalsdError anybody's.
    """

    session: EngineSession
    run: Callable[[KVPool], KeysValues | None]
    answer: asyncio.Future[Any]

    @classmethod
    def reading(cls, session: EngineSession, place: Place, answer: asyncio.Future[Any]) -> Transfer:
        """Answers the chunk at ``place``, which the session holds."""
        return cls(session, partial(_read, session.kv, place), answer)

    @classmethod
    def writing(
        cls, session: EngineSession, place: Place, chunk: KeysValues, answer: asyncio.Future[Any]
    ) -> Transfer:
        """Puts the chunk at ``place``, mapping pages for it."""
        return cls(session, partial(_write, session.kv, place, chunk), answer)


class RolledBack(EngineError):
    """The session was rolled back, by a step that came meanwhile, to before the end of what was to be read."""


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """What fails here has changed nobody else's pages: EngineError, unless the device is lost."""
    try:
        yield
    except Exception as error:
        if device_loss(error) is not None:
            raise
        log.error("transfer_failed", exc_info=error)
        raise EngineError(f"moving keys and values failed: {type(error).__name__}") from error


class CopyMark:
    """How far a copy of a session's keys and values is right, while the session's steps go on.

    One copy at a time. ``settled``: tokens of each row that no step under way writes.
    """

    __slots__ = ("_copied", "settled")

    def __init__(self) -> None:
        self.settled = 0
        self._copied = 0

    def step_begins(self, step: Step) -> None:
        """From its start on the tokens become others, and all do when rows change places."""
        self.settled = step.start
        self._copied = 0 if step.hypo_ids is not None else min(self._copied, step.start)

    def restart(self) -> None:
        """Nothing is copied yet."""
        self._copied = 0

    def take(self) -> range:
        """The tokens that the copy lacks or has wrong, below ``settled``; what is read from now on counts."""
        missing = range(self._copied, self.settled)
        self._copied = self.settled
        return missing

    def give_back(self, missing: range) -> None:
        """They could not be read after all."""
        self._copied = min(self._copied, missing.start)


def _read(kv: KVSession, place: Place, pool: KVPool) -> KeysValues:
    if kv.length < place.end:
        raise RolledBack(f"tokens {place.start} to {place.end} of a session that holds {kv.length}")
    slots = _slots(kv, place, kv.length, pool)
    with _harmless():
        keys, values = pool.kv.gather(slots)
        shape = len(place.blocks), kv.batch, place.end - place.start, *keys.shape[1:]
        return keys.view(shape).cpu(), values.view(shape).cpu()


def _write(kv: KVSession, place: Place, chunk: KeysValues, pool: KVPool) -> None:
    length = max(kv.length, place.end)
    slots = _slots(kv, place, length, pool)
    kv.overwrite(place.start, place.end)  # the spill file may have these pages as they were before
    with _harmless(), torch.inference_mode():
        keys, values = (part.flatten(0, 2).to(pool.device, pool.dtype) for part in chunk)
        pool.kv.write(slots, keys, values)


def _slots(kv: KVSession, place: Place, length: int, pool: KVPool) -> torch.Tensor:
    """``[blocks * B * n]`` int64 on the pool's device: where these tokens lie, once ``length`` are in memory."""
    room = pool.make_room([(kv, length)])
    if room.failed:
        raise room.failed[0]
    if not room.ready:
        raise EngineError("the session's pages do not fit into memory now")
    kv.extend(length)
    pool.apply_copies()
    page_tokens = pool.kv.page_tokens
    origins = np.empty((kv.batch, -(-length // page_tokens)), dtype=np.int32)
    pool.fill_origins([kv], origins)
    positions = np.arange(place.start, place.end)
    blocks = np.arange(place.blocks.start, place.blocks.end).reshape(-1, 1, 1)
    pages = origins[:, positions // page_tokens].astype(np.int64) + blocks
    slots = pages * page_tokens + positions % page_tokens
    return torch.from_numpy(slots.reshape(-1)).to(pool.device)
