"""The same work for both clients: the stock one in its own environment, and ours in this process."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from petalsd.client.autograd import remote_blocks
from petalsd.client.model import RemoteCausalLM
from petalsd.client.options import ClientOptions
from tests.interop.models import Model
from tests.interop.reference import PassInputs, PassResult, greedy_ids
from tests.interop.stock import StockClient


def stock_greedy_ids(
    client: StockClient,
    model: Model,
    peers: list[str],
    input_ids: list[list[int]],
    max_new_tokens: int,
    **settings: object,
) -> list[list[int]]:
    """``settings`` of the client, here and below."""
    swarm = {**model.swarm(peers), **settings}
    answer = client.call("generate", swarm=swarm, input_ids=input_ids, max_new_tokens=max_new_tokens)
    ids: list[list[int]] = answer["output_ids"]
    return ids


def stock_pass(
    client: StockClient,
    model: Model,
    peers: list[str],
    inputs: PassInputs,
    directory: Path,
    **settings: object,
) -> PassResult:
    """``directory`` takes the files that the tensors travel in."""
    tensors = {"hidden": inputs.hidden, "grad_output": inputs.grad_output}
    if inputs.prompts is not None:
        tensors["prompts"] = inputs.prompts
    sent, received = directory / "inputs.safetensors", directory / "results.safetensors"
    save_file(tensors, sent)
    client.call("passes", swarm={**model.swarm(peers), **settings}, inputs=sent, results=received)
    results = load_file(received)
    return PassResult(results["output"], results["grad_hidden"], results.get("grad_prompts"))


def our_greedy_ids(
    model: Model, peers: list[str], input_ids: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    with connect(model, peers) as remote:
        return greedy_ids(remote, input_ids, max_new_tokens)


def our_pass(model: Model, peers: list[str], inputs: PassInputs) -> PassResult:
    hidden = inputs.hidden.clone().requires_grad_()
    prompts = None if inputs.prompts is None else inputs.prompts.clone().requires_grad_()
    with connect(model, peers) as remote:
        output = remote_blocks(remote.runtime, remote.client.passes, hidden, prompts)
        output.backward(inputs.grad_output)
    assert hidden.grad is not None
    return PassResult(output.detach(), hidden.grad, None if prompts is None else prompts.grad)


def connect(model: Model, peers: list[str], options: ClientOptions | None = None) -> RemoteCausalLM:
    return RemoteCausalLM.from_pretrained(
        model.directory,
        initial_peers=peers,
        dht_prefix=model.dht_prefix,
        dtype=torch.float32,
        options=options,
    )
