"""Clients of the tests' own process, in the network of a lab, that can be held in the middle of a generation."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import PreTrainedModel

from petalsd.client.model import RemoteCausalLM
from petalsd.client.options import ClientOptions

PROMPT = torch.tensor([[5, 9, 17, 3]])
WAIT_S = 60.0
# There is no other server to go on with: the first failure is the end of a generation.
NO_SECOND_TRY = ClientOptions(max_failures=0)


def connect(model: Path, maddr: str) -> RemoteCausalLM:
    return RemoteCausalLM.from_pretrained(model, initial_peers=[maddr], options=NO_SECOND_TRY)


def generate(model: Path, maddr: str, num_tokens: int = 8) -> list[int]:
    """The greedy continuation by a client that is new to the swarm."""
    with connect(model, maddr) as client:
        return greedy(client, PROMPT, num_tokens)


def greedy(model: PreTrainedModel | RemoteCausalLM, prompt: torch.Tensor, num_tokens: int) -> list[int]:
    """New tokens only."""
    output = model.generate(prompt, max_new_tokens=num_tokens, do_sample=False)
    return list(output[0, prompt.shape[1] :].tolist())


class Held:
    """A streamer that lets ``hold_at`` tokens pass and the others only after ``release``."""

    def __init__(self, hold_at: int) -> None:
        self._hold_at = hold_at
        self._count = -1  # the prompt comes first
        self._reached = threading.Event()
        self._released = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        self._count += 1
        if self._count == self._hold_at:
            self._reached.set()
            assert self._released.wait(WAIT_S), "nobody released this generation"

    def end(self) -> None:
        """The last token came."""

    def wait(self) -> None:
        assert self._reached.wait(WAIT_S), f"no {self._hold_at} tokens came"

    def release(self) -> None:
        self._released.set()


class Generation:
    """A greedy generation on a thread of ``pool``, held after ``hold_at`` tokens until ``release``."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        client: RemoteCausalLM,
        prompt: torch.Tensor,
        num_tokens: int,
        hold_at: int,
    ) -> None:
        self._streamer = Held(hold_at)
        self._prompt_tokens = prompt.shape[1]
        self._future: Future[torch.Tensor] = pool.submit(
            client.generate, prompt, max_new_tokens=num_tokens, do_sample=False, streamer=self._streamer
        )

    def wait_held(self) -> None:
        """Until it is in the middle."""
        self._streamer.wait()

    def release(self) -> None:
        self._streamer.release()

    def tokens(self) -> list[int]:
        """All new ones, when it has come to its end; raises what ended it before."""
        return list(self._future.result(WAIT_S)[0, self._prompt_tokens :].tolist())

    def error(self) -> BaseException | None:
        return self._future.exception(WAIT_S)
