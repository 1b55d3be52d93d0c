"""Generates with the stock client: greedy or beam search. Only token ids go in and out."""

from __future__ import annotations

import time
from typing import Any

import torch
from swarm_model import connect
from transformers import AutoModelForCausalLM


def generate(
    swarm: dict[str, Any],
    input_ids: list[list[int]],
    max_new_tokens: int,
    num_beams: int = 1,
    local: bool = False,
) -> dict[str, Any]:
    """``local``: also generate with transformers in this process, the same way, as the expected answer."""
    prompt = torch.tensor(input_ids)
    how = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
    remote_model = connect(swarm)
    started = time.perf_counter()
    result = {"output_ids": remote_model.generate(prompt, **how).tolist()}
    result["seconds"] = time.perf_counter() - started
    if local:
        local_model = AutoModelForCausalLM.from_pretrained(swarm["model"], torch_dtype=torch.float32)
        result["expected_ids"] = local_model.generate(prompt, **how).tolist()
    return result
