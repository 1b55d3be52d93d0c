"""What the swarm should have computed: transformers, in this process, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.numeric import assert_close


@dataclass(frozen=True, slots=True)
class PassInputs:
    """hidden, grad_output ``[B, n, M]``; prompts None or ``[num_blocks, B, prefix, M]``."""

    hidden: torch.Tensor
    grad_output: torch.Tensor
    prompts: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PassResult:
    """Shapes as in PassInputs; ``grad_prompts`` is None without prompts."""

    output: torch.Tensor
    grad_hidden: torch.Tensor
    grad_prompts: torch.Tensor | None


def random_inputs(model: PreTrainedModel, batch: int, tokens: int, prefix: int | None) -> PassInputs:
    """``prefix`` None makes no prompts."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    shape = (batch, tokens, config.hidden_size)
    hidden, grad_output = (torch.randn(shape, generator=generator) for _ in range(2))
    if prefix is None:
        return PassInputs(hidden, grad_output, None)
    prompt_shape = (config.num_hidden_layers, batch, prefix, config.hidden_size)
    return PassInputs(hidden, grad_output, torch.randn(prompt_shape, generator=generator))


def greedy_ids(model: PreTrainedModel, input_ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Prompt and continuation."""
    prompt = torch.tensor(input_ids)
    ids: list[list[int]] = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False
    ).tolist()
    return ids


def run_pass(model: PreTrainedModel, inputs: PassInputs) -> PassResult:
    """All blocks, causal from position 0; slice k of the prompts is added to the first positions of block k."""
    hidden = inputs.hidden.clone().requires_grad_()
    prompts = None if inputs.prompts is None else inputs.prompts.clone().requires_grad_()
    with _prompts_added(model, prompts), _output_of_last_block(model) as outputs:
        model.model(inputs_embeds=hidden, use_cache=False)
    outputs[0].backward(inputs.grad_output)
    assert hidden.grad is not None
    return PassResult(outputs[0].detach(), hidden.grad, None if prompts is None else prompts.grad)


def assert_same_pass(actual: PassResult, expected: PassResult) -> None:
    """To 1e-4 of the largest value: float32 summed in another order."""
    _assert_similar(actual.output, expected.output, "output")
    _assert_similar(actual.grad_hidden, expected.grad_hidden, "grad_hidden")
    assert (actual.grad_prompts is None) == (expected.grad_prompts is None)
    if actual.grad_prompts is not None and expected.grad_prompts is not None:
        _assert_similar(actual.grad_prompts, expected.grad_prompts, "grad_prompts")


def _assert_similar(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert_close(actual, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4, what=what)


@contextmanager
def _prompts_added(model: PreTrainedModel, prompts: torch.Tensor | None) -> Iterator[None]:
    def add(prompt: torch.Tensor) -> Any:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden, *others = arguments
            head, tail = hidden.split([prompt.shape[1], hidden.shape[1] - prompt.shape[1]], dim=1)
            return (torch.cat([head + prompt, tail], dim=1), *others)

        return hook

    blocks = zip(model.model.layers, prompts, strict=True) if prompts is not None else ()
    handles = [block.register_forward_pre_hook(add(prompt)) for block, prompt in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _output_of_last_block(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    outputs: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = model.model.layers[-1].register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
