"""What a model and its ``generate`` may be asked for: the rest is refused, instead of computed differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from petalsd.client.cache import RemoteCache
from petalsd.client.padding import check_positions, read_padding
from petalsd.config_addresses import check_maddr
from petalsd.errors import BadRequest

_NOT_REMOTE = ("output_attentions", "output_hidden_states", "output_router_logits")


def check_peers(initial_peers: Sequence[str]) -> None:
    """Addresses of peers, one at least: alone a client would wait for servers in vain."""
    if isinstance(initial_peers, str) or not initial_peers:
        raise BadRequest(
            "initial_peers", initial_peers, "a list of multiaddrs of members of the swarm is needed"
        )
    for peer in initial_peers:
        try:
            check_maddr(peer, needs_peer=True)
        except ValueError as error:
            raise BadRequest("initial_peers", peer, str(error)) from error


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """As in transformers; None for ``auto``."""
    if dtype is None or dtype == "auto":
        return None
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise BadRequest("dtype", dtype, 'a floating-point dtype of torch, its name, or "auto" is needed')
    return named


def setting(name: str, given: Mapping[str, Any], configs: Sequence[GenerationConfig | None]) -> Any:
    """What a call of ``generate`` with these arguments will find under ``name``; None: transformers' default."""
    values = [given.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


def is_without_cache(given: Mapping[str, Any], configs: Sequence[GenerationConfig | None]) -> bool:
    """Whether a call of ``generate`` asks for none. Over embeddings transformers always uses one."""
    return setting("use_cache", given, configs) is False and given.get("inputs_embeds") is None


def check_text(given: Mapping[str, Any]) -> None:
    """transformers counts what is new from the end, and would feed any tokens of a text that ends too early."""
    name, text = "inputs_embeds", given.get("inputs_embeds")
    if text is None:
        name = "input_ids"
        text = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
    if not isinstance(text, torch.Tensor):
        return
    _check_form(name, text)
    cache, mask, length = given.get("past_key_values"), given.get("attention_mask"), text.shape[1]
    position = cache.position if isinstance(cache, RemoteCache) else 0
    if position and name == "input_ids" and isinstance(mask, torch.Tensor) and mask.shape[-1] != length:
        if mask.shape[-1] != position + length:
            rule = f"it covers the text, or what the session holds ({position} tokens) and {length} new ones"
            raise BadRequest("attention_mask", tuple(mask.shape), rule)
    elif length <= position:
        rule = f"give the whole text, what the session holds ({position} tokens) and at least one token more"
        raise BadRequest(name, tuple(text.shape), rule)


def check_settings(given: Mapping[str, Any], configs: Sequence[GenerationConfig | None]) -> None:
    """Refuse caches of transformers', and the engine that it runs over one of them."""
    kind = setting("cache_implementation", given, configs)
    if kind is not None:
        raise BadRequest("cache_implementation", kind, "the servers hold the cache: leave it out")


def check_generation(config: GenerationConfig, mode: GenerationMode, cache: RemoteCache) -> None:
    """Refuse what transformers' loops would do wrongly over a session."""
    if config.use_cache is not True:
        raise BadRequest("use_cache", config.use_cache, "a session is a cache: leave one of them out")
    if config.guidance_scale is not None and config.guidance_scale != 1:
        # The model runs once more for it, over a cache that it is expected to make.
        rule = "it is computed without a session only: use_cache=False"
        raise BadRequest("guidance_scale", config.guidance_scale, rule)
    if config.is_assistant:
        # Its cache must last over calls.
        raise BadRequest(
            "assistant_model", "RemoteCausalLM", "an assistant is a model of transformers, all here"
        )
    if config.assistant_early_exit is not None:
        raise BadRequest("assistant_early_exit", config.assistant_early_exit, "all blocks run on the servers")
    if mode == GenerationMode.ASSISTED_GENERATION and cache.position > 0:
        # Its first step feeds the whole text.
        rule = (
            "assisted generation begins with an empty session: assign position = 0, or leave assistance out"
        )
        raise BadRequest("past_key_values", f"{cache.position} tokens", rule)


def check_inputs(
    embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: object, others: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """``embeds`` ``[B, n, M]`` are the step's; ``others`` are forward's arguments without names.

    Returns how many tokens of padding each row begins with; None where none does.
    """
    if cache is not None and not isinstance(cache, RemoteCache):
        raise BadRequest("past_key_values", type(cache).__name__, "use model.inference_session()")
    if cache is None and others.get("use_cache"):
        raise BadRequest("use_cache", True, "pass past_key_values=model.inference_session(max_tokens=...)")
    if cache is not None and embeds.requires_grad and torch.is_grad_enabled():
        rule = "a session gives no gradients: leave past_key_values out, or compute under torch.no_grad()"
        raise BadRequest("inputs_embeds", tuple(embeds.shape), rule)
    for name in _NOT_REMOTE:
        if others.get(name):
            raise BadRequest(name, others[name], "the remote blocks do not support it")
    position, length = 0 if cache is None else cache.position, embeds.shape[1]
    padding = read_padding(attention_mask, position, length, ends=cache is None)
    if cache is not None:
        padding = cache.check_padding(padding)
    check_positions(others.get("position_ids"), position, length, padding)
    return padding if padding and any(padding) else None


def check_tokens(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Exactly one of them, ``[B, n]`` or ``[B, n, M]``, not empty."""
    if (input_ids is None) == (inputs_embeds is None):
        raise BadRequest("input_ids", input_ids, "exactly one of input_ids and inputs_embeds is needed")
    if input_ids is not None:
        _check_form("input_ids", input_ids)
    elif inputs_embeds is not None:
        _check_form("inputs_embeds", inputs_embeds)


def _check_form(name: str, text: torch.Tensor) -> None:
    is_ids = name == "input_ids"
    if text.ndim != (2 if is_ids else 3) or text.shape[0] < 1 or text.shape[1] < 1:
        rule = "its shape is [rows, tokens], one or more" if is_ids else "its shape is [rows, tokens, hidden]"
        raise BadRequest(name, tuple(text.shape), rule)
