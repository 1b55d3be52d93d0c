"""Clients ask for ten times what they use: how many are admitted at once, and that all get their answers."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest
import torch

from petalsd.config import EngineSection
from petalsd.daemon.spilling import AUTO_CACHES
from petalsd.engine.engine import Engine
from petalsd.engine.handle import Session
from petalsd.engine.step import SessionSpec, Step
from petalsd.errors import OutOfPages
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest
from petalsd.kvcache.sizing import pages_for
from petalsd.kvcache.spill import SpillArea
from petalsd.kvcache.waiting import AdmissionRules
from tests.engine.rig import CPU, PAGE_TOKENS, TinyModel, serving, states
from tests.numeric import assert_close

ASKED_TOKENS = 128
USED_TOKENS = 12
KV_TOKENS = 4 * ASKED_TOKENS  # memory for four sessions that are reserved whole


@pytest.fixture
def area(llama: TinyModel, tmp_path: Path) -> SpillArea:
    """As a daemon takes it on a disk with room."""
    geometry = llama.pool(1).geometry
    num_pages = pages_for(KV_TOKENS, llama.config.num_blocks, geometry.page_tokens)
    return SpillArea(tmp_path, AUTO_CACHES * num_pages * geometry.page_bytes, keep_free_bytes=0)


async def admit(engine: Engine) -> list[Session]:
    """As many sessions as the engine takes."""
    assert engine.span is not None
    sessions: list[Session] = []
    for number in itertools.count():
        try:
            sessions.append(
                await engine.open_session(SessionSpec(engine.span, 1, ASKED_TOKENS, f"{number % 5}"))
            )
        except OutOfPages:
            break
    return sessions


async def test_eight_times_as_many_are_admitted_and_run_to_their_end(
    llama: TinyModel, area: SpillArea
) -> None:
    """At memory for four whole sessions; their lengths are those of chats, and every answer is right."""
    rng = random.Random(0)
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine:
        sessions = await admit(engine)
        assert len(sessions) >= 8 * (KV_TOKENS // ASKED_TOKENS)
        lengths = [min(ASKED_TOKENS, 2 + round(rng.expovariate(1 / USED_TOKENS))) for _ in sessions]
        hidden = [states(1, length, seed) for seed, length in enumerate(lengths)]

        pairs = list(zip(sessions, hidden, strict=True))
        firsts = await asyncio.gather(*(s.step(Step(h[:, :-1], 0)) for s, h in pairs))
        lasts = await asyncio.gather(*(s.step(Step(h[:, -1:], s.position)) for s, h in pairs))
        assert engine.pool.stats().pages_restored > 0, "there was memory for all: the test is too easy"
        await asyncio.gather(*(session.close() for session in sessions))
    for its, *answers in zip(hidden, firsts, lasts, strict=True):
        actual = torch.cat(answers, dim=1)
        assert_close(actual, llama.expected(its).detach(), atol=1e-4, rtol=1e-4, what="one of many")


async def test_all_may_take_what_they_asked_for(llama: TinyModel, area: SpillArea) -> None:
    """The promise is kept in the worst case: every session that was admitted grows to its last token."""
    async with serving(llama, kv_tokens=KV_TOKENS, spill=area) as engine:
        sessions = await admit(engine)
        hidden = states(1, ASKED_TOKENS)
        answers = await asyncio.gather(*(session.step(Step(hidden, 0)) for session in sessions))
        assert engine.pool.stats().pages_spilled == (len(sessions) - 4) * 4 * ASKED_TOKENS // PAGE_TOKENS
        engine.pool.check_integrity()
        await asyncio.gather(*(session.close() for session in sessions))
    for actual in answers:
        assert_close(actual, llama.expected(hidden).detach(), atol=1e-4, rtol=1e-4, what="a full session")


async def test_one_peer_alone_is_admitted_eight_times_too(llama: TinyModel, area: SpillArea) -> None:
    """The default share of a peer leaves room for others, and yet that much to a single one."""
    rules = AdmissionRules(max_peer_share=EngineSection().max_peer_share)
    geometry, num_blocks = llama.pool(1).geometry, llama.config.num_blocks
    num_pages = pages_for(KV_TOKENS, num_blocks, geometry.page_tokens)
    pool = KVPool(geometry, num_pages, torch.float32, CPU, rules, area)
    pool.allocate()
    request = KVRequest(0, num_blocks, 1, ASKED_TOKENS, "alone")
    for _ in range(8 * 4):
        await pool.reserve(request, 0)
    pool.close()
