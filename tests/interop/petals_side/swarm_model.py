"""The stock client's model of a swarm, kept between jobs: connecting takes seconds."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from petals import AutoDistributedModelForCausalLM


def connect(swarm: dict[str, Any]) -> Any:
    """``swarm``: model (directory in the old spelling), initial_peers, dht_prefix. Float32."""
    return _connect(json.dumps(swarm, sort_keys=True))


@lru_cache(maxsize=4)
def _connect(swarm: str) -> Any:
    settings = json.loads(swarm)
    model = settings.pop("model")
    return AutoDistributedModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32, **settings)
