"""Answers in the making: each is computed on a thread of its own and read on the loop.

The threads' steps meet at the servers, which batch them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from petalsd.errors import Draining, Overloaded
from petalsd.gateway.sampling import Sampling
from petalsd.gateway.text import Decode, Detokenizer, StopStrings

FinishReason = Literal["stop", "length"]


class Model(Protocol):
    """What is asked of ``RemoteCausalLM``."""

    generation_config: Any

    def generate(self, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """``input_ids`` ``[1, n]``; ``max_tokens`` and ``stops`` bound what follows."""

    input_ids: torch.Tensor
    max_tokens: int
    stops: Sequence[str]
    sampling: Sampling

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[1])


class Generation:
    """One answer. Read ``pieces`` to their end, then ``finish_reason`` and ``num_tokens`` are final."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.finish_reason: FinishReason = "length"
        self.num_tokens = 0
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | Exception | None] = asyncio.Queue()  # one for each token at most
        self._is_cancelled = threading.Event()

    async def pieces(self) -> AsyncIterator[str]:
        """Text as it comes; raises what ended the generation early."""
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def cancel(self) -> None:
        """It ends with the step that is on its way; whoever still reads gets Draining."""
        self._is_cancelled.set()

    # On the thread

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled.is_set()

    def put(self, piece: str | Exception | None) -> None:
        """A text, or how it ended: None for well. Whoever waited on a loop that has ended hears nothing."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Generators:
    """So many answers at once, and no more: further ones are refused, so that nobody waits unnoticed."""

    def __init__(self, model: Model, tokenizer: Any, max_generations: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_generations = max_generations
        self._threads = ThreadPoolExecutor(max_generations, thread_name_prefix="gateway")
        self._running: dict[Generation, asyncio.Future[None]] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    def start(self, prompt: Prompt) -> Generation:
        """Raises Overloaded."""
        if len(self._running) >= self._max_generations:
            text = f"{self._max_generations} answers are being made, which is all that is allowed"
            raise Overloaded(text, hint="try again in a moment")
        generation = Generation(prompt.num_tokens)
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self._threads, self._generate, generation, prompt)
        self._running[generation] = done
        done.add_done_callback(lambda _: self._running.pop(generation))
        return generation

    async def drain(self, timeout_s: float) -> int:
        """Wait until all are complete, then cancel; returns how many were not."""
        if self._running:
            await asyncio.wait(self._running.values(), timeout=timeout_s)
        for generation in self._running:
            generation.cancel()
        return len(self._running)

    def close(self) -> None:
        """Start nothing more; a step that is on its way is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _generate(self, generation: Generation, prompt: Prompt) -> None:
        writer = _Writer(generation, self._decode, prompt)
        try:
            output = self._model.generate(
                prompt.input_ids,
                attention_mask=torch.ones_like(prompt.input_ids),
                max_new_tokens=prompt.max_tokens,
                do_sample=False,
                num_beams=1,
                logits_processor=prompt.sampling.processors(prompt.num_tokens),
                stopping_criteria=StoppingCriteriaList([writer]),
                tokenizer=self._tokenizer,  # tells what stop strings of the model's own settings are
            )
            if generation.is_cancelled:
                raise Draining("the answer was cut off before it was complete", hint="the gateway stops")
            writer.end()
            if writer.is_stopped or int(output[0, -1]) in self._ends():
                generation.finish_reason = "stop"
            generation.put(None)
        except Exception as error:
            generation.put(error)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _ends(self) -> Collection[int]:
        ends = self._model.generation_config.eos_token_id
        return [ends] if isinstance(ends, int) else ends or []


class _Writer(StoppingCriteria):  # type: ignore[misc]  # transformers ships no types here
    """Is asked behind each token whether to go on, and writes its text: a streamer would be told later."""

    def __init__(self, generation: Generation, decode: Decode, prompt: Prompt) -> None:
        self._generation = generation
        self._tokens = Detokenizer(decode)
        self._stops = StopStrings(prompt.stops)

    @property
    def is_stopped(self) -> bool:
        return self._stops.is_found

    def __call__(self, input_ids: torch.Tensor, scores: object, **more: object) -> torch.Tensor:
        known = self._generation.num_prompt_tokens + self._generation.num_tokens
        new = input_ids[0, known:].tolist()
        for token in new if not self.is_stopped else ():
            self._generation.num_tokens += 1
            self._write(self._stops.add(self._tokens.add(token)))
        is_over = self.is_stopped or self._generation.is_cancelled
        return torch.full((input_ids.shape[0],), is_over, device=input_ids.device)

    def end(self) -> None:
        """What waited for more."""
        self._write(self._stops.add(self._tokens.end()))
        self._write(self._stops.end())

    def _write(self, text: str) -> None:
        if text:
            self._generation.put(text)
