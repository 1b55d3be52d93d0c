"""Runs under stock Petals' Python: decode steps through its Llama block of random weights.

Prints JSON: for each number of rows that the job names, the seconds of each step.
"""

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
    with torch.device(device):  # drawing there takes no time
        # A new one each time: it captures parts of itself for the batch that comes first, and fails with others.
        blocks = (WrappedLlamaBlock(config).to(dtype).eval().requires_grad_(False) for _ in job["rows"])
        print(
            json.dumps(
                [steps(block, shape, rows, job) for block, rows in zip(blocks, job["rows"], strict=True)]
            )
        )


@torch.inference_mode()
def steps(block: Any, shape: dict[str, Any], num_rows: int, job: dict[str, Any]) -> list[float]:
    """Seconds of each, for a new token of each row."""
    rows, past, dtype = num_rows * shape["num_kv_heads"], job["context"] - 1, next(block.parameters()).dtype
    keys, values = (
        torch.randn(rows, *size).to(dtype) for size in ((shape["head_dim"], past), (past, shape["head_dim"]))
    )
    hidden = torch.randn(num_rows, 1, shape["hidden"]).to(dtype)

    def step() -> float:
        started = time.perf_counter()
        block(hidden, layer_past=(keys, values), use_cache=True)
        if hidden.device.type == "cuda":
            torch.cuda.synchronize(hidden.device)
        return time.perf_counter() - started

    for _ in range(_WARM_UPS):
        step()
    return [step() for _ in range(job["samples"])]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
