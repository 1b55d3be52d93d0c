"""Generates in two parts with one session of the stock client, so that the swarm can change in between."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from swarm_model import connect

_begun: list[tuple[contextlib.ExitStack, Any]] = []


def begin_generation(
    swarm: dict[str, Any], input_ids: list[list[int]], max_new_tokens: int, max_length: int
) -> dict[str, Any]:
    """``servers``: PeerIDs that the session goes through."""
    model = connect(swarm)
    stack = contextlib.ExitStack()
    session = stack.enter_context(model.inference_session(max_length=max_length))
    _begun.append((stack, session))
    ids = model.generate(
        torch.tensor(input_ids), max_new_tokens=max_new_tokens, do_sample=False, session=session
    )
    servers = [one.span.peer_id.to_base58() for one in session._server_sessions]
    return {"output_ids": ids.tolist(), "servers": servers}


def finish_generation(swarm: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """New tokens of the session that was begun last, which ends."""
    stack, session = _begun.pop()
    with stack:
        ids = connect(swarm).generate(None, max_new_tokens=max_new_tokens, do_sample=False, session=session)
        return {"output_ids": ids.tolist()}
