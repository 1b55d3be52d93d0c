"""Sessions of the stock client that decode at once, one thread for each; they stay open between jobs."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from petals.client.inference_session import InferenceSession
from swarm_model import connect

_SESSIONS: dict[str, list[InferenceSession]] = {}


def open_sessions(swarm: dict[str, Any], sessions: int, prefill: int, max_length: int) -> dict[str, Any]:
    """Open that many sessions through all blocks, each fed ``prefill`` random states."""
    blocks = connect(swarm).transformer.h
    opened = [InferenceSession(blocks.sequence_manager, max_length) for _ in range(sessions)]
    _SESSIONS[json.dumps(swarm, sort_keys=True)] = opened
    _feed_all(opened, blocks.config.hidden_size, prefill, 1)
    return {}


def close_sessions(swarm: dict[str, Any]) -> dict[str, Any]:
    """End the sessions of this swarm."""
    for session in _SESSIONS.pop(json.dumps(swarm, sort_keys=True)):
        session.close()
    return {}


def decode(swarm: dict[str, Any], steps: int) -> dict[str, Any]:
    """All sessions take ``steps`` steps of one token at once; answers the seconds that it took."""
    started = time.perf_counter()
    _feed_all(
        _SESSIONS[json.dumps(swarm, sort_keys=True)],
        connect(swarm).transformer.h.config.hidden_size,
        1,
        steps,
    )
    return {"seconds": time.perf_counter() - started}


def _feed_all(sessions: list[InferenceSession], hidden_size: int, tokens: int, steps: int) -> None:
    def feed(session: InferenceSession) -> None:
        with torch.inference_mode():
            for _ in range(steps):
                session.step(torch.randn(1, tokens, hidden_size))

    with ThreadPoolExecutor(len(sessions)) as executor:
        list(executor.map(feed, sessions))
