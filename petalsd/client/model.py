"""A causal language model of transformers whose blocks are remote: embeddings, final norm and head are local."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from petalsd.client.arguments import (
    check_generation,
    check_inputs,
    check_peers,
    check_settings,
    check_text,
    check_tokens,
    is_without_cache,
    named_dtype,
)
from petalsd.client.autograd import remote_blocks
from petalsd.client.cache import RemoteCache
from petalsd.client.head import LocalHead
from petalsd.client.options import ClientOptions
from petalsd.client.padding import moved_back, moved_left
from petalsd.client.runtime import ClientRuntime
from petalsd.client.swarm_client import SwarmClient
from petalsd.errors import BadRequest, WeightsError
from petalsd.models.architecture import Architecture
from petalsd.models.head_rule import HeadRule
from petalsd.models.head_weights import HeadWeights, PackedHeadWeights, load_packed_head
from petalsd.models.model_config import ModelConfig, text_part
from petalsd.models.naming import dht_prefix as derive_prefix
from petalsd.models.rope import LengthRegimes
from petalsd.models.source import ModelSource

_GENERATION_CONFIG_FILE = "generation_config.json"


class RemoteCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers ships no types here
    """Build it with ``from_pretrained``; ``close`` it, or use it as a context manager; when collected, it leaves.

    ``generate`` works as everywhere in transformers (greedy, sampling, beams, assistants, streamers); it may be
    called from several threads. Calling the model without a cache runs a pass through the swarm, which is
    differentiable. The local weights are frozen.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self,
        config: PreTrainedConfig,
        head: HeadWeights | PackedHeadWeights,
        runtime: ClientRuntime,
        client: SwarmClient,
        rule: HeadRule | None = None,
    ) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.head = LocalHead(head, rule or HeadRule())
        self.runtime = runtime
        self.client = client
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | ModelSource,
        *,
        initial_peers: Sequence[str],
        dht_prefix: str | None = None,
        dtype: torch.dtype | str | None = None,
        options: ClientOptions | None = None,
    ) -> RemoteCausalLM:
        """Load the local parts of a model and join the swarm that serves its blocks.

        source         directory or Hub repository; a ModelSource for a revision, a token or offline work
        initial_peers  multiaddrs of members of the swarm
        dht_prefix     what its servers were started with, if not derived from the name
        dtype          of the local parts, or its name; None and "auto": the checkpoint's

        Raises BadRequest, WeightsError, ModelError, or SwarmError when no peer answers.
        """
        check_peers(initial_peers)
        files = source if isinstance(source, ModelSource) else ModelSource(str(source))
        raw = files.config()
        architecture = Architecture.read(raw)
        blocks, rule = architecture.config, architecture.head_rule()
        prefix = derive_prefix(blocks.model_type, files.source, files.is_directory, dht_prefix)
        head = load_packed_head(files, blocks, rule, named_dtype(dtype) or blocks.dtype or torch.float32)
        config = CONFIG_MAPPING[blocks.model_type].from_dict(dict(text_part(raw)))
        settings = read_generation_config(files, config)
        client = SwarmClient(prefix, blocks.num_blocks, initial_peers, options, _whole_from(blocks))
        runtime = ClientRuntime()
        model = cls(config, head, runtime, client, rule)
        model.generation_config = settings
        runtime.start()
        try:
            runtime.run(client.start())
        except BaseException:  # Ctrl-C may come when it is done
            model.close()
            raise
        weakref.finalize(model, runtime.stop_soon, client.stop).atexit = False
        return model

    def close(self) -> None:
        """Leave the swarm; idempotent. Sessions end."""
        if self.runtime.is_running:
            self.runtime.run(self.client.stop())
            self.runtime.stop()

    def inference_session(self, max_tokens: int | None = None) -> RemoteCache:
        """A cache to pass as ``past_key_values`` to several calls; a context manager.

        ``max_tokens`` is what its rows may reach, prompts included; None: what the first ``generate`` needs.
        """
        if max_tokens is not None and max_tokens < 1:
            raise BadRequest("max_tokens", max_tokens, "a session has room for one token or more")
        return RemoteCache(self.runtime, self.client.session, max_tokens)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Without ``past_key_values`` a session is opened for this call and closed after."""
        given = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
        configs = given.get("generation_config"), self.generation_config
        check_settings(given, configs)
        check_text(given)
        cache = kwargs.get("past_key_values")
        if cache is not None or is_without_cache(given, configs):
            with cache.in_use() if isinstance(cache, RemoteCache) else contextlib.nullcontext():
                return super().generate(*args, **kwargs)
        with self.inference_session() as cache:
            return super().generate(*args, **{**kwargs, "past_key_values": cache})

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, n, V]`` for ``input_ids`` ``[B, n]`` or ``inputs_embeds`` ``[B, n, M]``.

        Shorter rows begin with padding, or end with it where there is no cache, as ``attention_mask`` says;
        positions count from the cache's, without it. The loss takes its settings from
        ``kwargs``. BadRequest names what the remote blocks cannot do.
        """
        check_tokens(input_ids, inputs_embeds)
        embeds = self.head.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        padding = check_inputs(embeds, attention_mask, past_key_values, kwargs)
        position = 0 if past_key_values is None else past_key_values.position
        hidden = self.head.entering(embeds, position, padding)
        if past_key_values is not None:
            hidden = past_key_values.step(hidden, padding)
        elif padding is None:
            hidden = remote_blocks(self.runtime, self.client.passes, hidden)
        else:
            hidden = remote_blocks(self.runtime, self.client.passes, moved_left(hidden, padding))
            hidden = moved_back(hidden, padding)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head.logits(hidden[:, kept])
        loss = None
        if labels is not None:
            vocab_size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    @property
    def device(self) -> torch.device:
        """Where the local parts are; transformers would ask for a parameter, and packed tables are none."""
        return self.head.anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the local parts."""
        return self.head.anchor.dtype

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Not for a part of a model: what came out would load as one with random blocks."""
        raise NotImplementedError("only a part of the model is here: copy what it was loaded from")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Not here: transformers' own engine computes over a cache of its own."""
        raise NotImplementedError("servers batch what comes at once: call generate, from several threads")

    def get_input_embeddings(self) -> nn.Module:
        return self.head.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.head.lm_head

    def __enter__(self) -> RemoteCausalLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """transformers' hook between the length of a generation being known and its first step."""
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, RemoteCache):
            check_generation(generation_config, generation_mode, cache)
            cache.reserve(max_cache_length + 1 + _candidate_tokens(generation_config, generation_mode))
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )


def _candidate_tokens(generation_config: GenerationConfig, mode: GenerationMode) -> int:
    """What assisted generation may feed beyond the length before it rolls back."""
    if mode != GenerationMode.ASSISTED_GENERATION:
        return 0
    return max(generation_config.prompt_lookup_num_tokens or 0, generation_config.num_assistant_tokens or 0)


def _whole_from(config: ModelConfig) -> int | None:
    """From which position on a token's rotation depends on the length of the row it came with."""
    regimes = LengthRegimes.read(config.rope, config.max_positions)
    return None if regimes is None else regimes.limit


def read_generation_config(source: ModelSource, config: PreTrainedConfig) -> GenerationConfig:
    """The checkpoint's, but for what it says of the cache: that means memory here, and ours is the servers'.

    Raises WeightsError for one that cannot be used; a model needs none.
    """
    cache = {"use_cache": True, "cache_implementation": None}
    if not source.has(_GENERATION_CONFIG_FILE):
        settings = GenerationConfig.from_model_config(config)
        settings.update(**cache)
        return settings
    try:
        return GenerationConfig.from_dict(source.read_json(_GENERATION_CONFIG_FILE) | cache)
    except (TypeError, ValueError) as error:
        text = f"{_GENERATION_CONFIG_FILE} of {source.name} cannot be used: {error}"
        raise WeightsError(text) from error
