"""The answer of ``rpc_info``: what a client must know before its first request."""

from __future__ import annotations

import torch
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from petalsd.errors import NotServed
from petalsd.swarm.requests import served_span
from petalsd.swarm.serving import Serving

_SCHEMA_TOKENS = 2048  # a size that stock servers name and nobody reads


def answer_info(serving: Serving, uid: str, is_client_mode: bool) -> runtime_pb2.ExpertInfo:
    """General facts and, when ``uid`` names a block, its schemas; NotServed when the block is not here."""
    pool = serving.engine.pool
    info: dict[str, object] = {
        "version": serving.model.version,
        "dht_client_mode": is_client_mode,
        "cache_tokens_available": int(pool.tokens_free) if pool is not None else 0,
    }
    if uid:
        asked, served = served_span(uid, serving.model.prefix), serving.engine.span
        if served is None or not served.covers(asked):
            raise NotServed(f"blocks {asked}: {served or 'none'} are served here")
        info.update(_schemas(serving.model.hidden_size, serving.model.dtype))
    return runtime_pb2.ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))


def _schemas(hidden_size: int, dtype: torch.dtype) -> dict[str, object]:
    """Clients read the nesting, the lengths, and the compression of the first descriptor (NONE)."""
    hidden = BatchTensorDescriptor(1, _SCHEMA_TOKENS, hidden_size, dtype=dtype)
    prompts = BatchTensorDescriptor((), dtype=dtype)
    hypo_ids = BatchTensorDescriptor((), dtype=torch.int64)
    return {
        "forward_schema": ((hidden,), {}),
        "outputs_schema": (hidden,),
        "keyword_names": (),
        "inference_schema": ((hidden, prompts, hypo_ids), {}),
    }
