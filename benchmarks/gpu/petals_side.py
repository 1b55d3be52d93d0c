"""Runs under stock Petals' Python: seconds of decode steps through its Llama block of random weights, as JSON."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from petals.models.llama.block import WrappedLlamaBlock
from petals.models.llama.config import DistributedLlamaConfig

_WARM_UPS = 3


def main(job: dict[str, Any]) -> None:
    shape, device, dtype = job["shape"], torch.device(job["device"]), getattr(torch, job["dtype"])
    config = DistributedLlamaConfig(
        hidden_size=shape["hidden"], intermediate_size=shape["inner"], num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"], num_hidden_layers=1, vocab_size=8,
        max_position_embeddings=job["context"],
    )  # fmt: skip
    block = WrappedLlamaBlock(config).to(device, dtype).eval().requires_grad_(False)
    rows, past = job["rows"] * shape["num_kv_heads"], job["context"] - 1
    keys = torch.randn(rows, shape["head_dim"], past, device=device).to(dtype)
    values = torch.randn(rows, past, shape["head_dim"], device=device).to(dtype)
    hidden = torch.randn(job["rows"], 1, shape["hidden"], device=device).to(dtype)

    @torch.inference_mode()
    def step() -> float:
        started = time.perf_counter()
        block(hidden, layer_past=(keys, values), use_cache=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for _ in range(_WARM_UPS):
        step()
    print(json.dumps([step() for _ in range(job["samples"])]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
