"""How a job of stock Petals is called: a JSON object as its argument, a line ``result {...}`` as its answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from petals import AutoDistributedModelForCausalLM


def run(job: Callable[..., dict[str, Any]]) -> None:
    """Call the job with the arguments from the command line and print what it returns."""
    torch.manual_seed(0)
    result = job(**json.loads(sys.argv[1]))
    print("result", json.dumps(result), flush=True)  # noqa: T201 - the answer
    # The client's background threads and its p2pd have no orderly end; the caller ends the process group.
    os._exit(0)


def connect(model: str, initial_peers: list[str], dht_prefix: str, **settings: Any) -> Any:
    """The stock client's causal language model, its blocks served under ``dht_prefix``."""
    return AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=initial_peers, dht_prefix=dht_prefix, torch_dtype=torch.float32, **settings
    )
