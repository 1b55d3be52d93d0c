"""A client that generates the same tokens again and again on its own thread, whatever happens to the swarm."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from petalsd.client.model import RemoteCausalLM
from petalsd.client.options import ClientOptions
from tests.awaited import whereabouts
from tests.waiting import eventually

NEW_TOKENS, HALFWAY = 32, 12
WAIT_S = 120.0
OVER_S = 60.0
OPTIONS = ClientOptions(min_backoff_s=0.1, max_backoff_s=1.0, refresh_period_s=5.0)


class Generator(BaseStreamer):
    """``run`` until ``stop``: each output must be that of ``reference``. Its first generation waits halfway.

    ``rounds``: how many came to their end.
    """

    def __init__(self, model: Path, maddr: str, reference: PreTrainedModel, seed: int) -> None:
        self._model, self._maddr = model, maddr
        self._prompt = torch.randint(1, 256, (1, 12), generator=torch.Generator().manual_seed(seed))
        self._expected = self._generate(reference)
        self._tokens = -1  # the prompt comes first
        self._halfway, self._released, self._over = (threading.Event() for _ in range(3))
        self._remote: RemoteCausalLM | None = None
        self.rounds = 0

    async def run(self) -> None:
        """Raises what ends it before its time."""
        await asyncio.to_thread(self._run)

    async def over(self, running: asyncio.Task[None]) -> None:
        """Until ``run`` has ended after ``stop``; raises what it raised."""
        done, _ = await asyncio.wait({running}, timeout=OVER_S)
        if not done:
            assert self._remote is not None, "the client has not even started"
            tasks = self._remote.runtime.run(whereabouts())
            raise AssertionError(f"round {self.rounds}, token {self._tokens}:\n{tasks}")
        running.result()

    async def until_halfway(self) -> None:
        """Until the first generation waits in its middle."""
        await eventually(self._halfway.is_set, WAIT_S, 0.01)

    def release(self) -> None:
        self._released.set()

    async def a_round_more(self) -> None:
        """Until one that begins after now has come to its end."""
        goal = self.rounds + 2
        await eventually(lambda: self.rounds >= goal, WAIT_S, 0.01)

    def stop(self) -> None:
        """After the generation that is under way."""
        self._over.set()
        self._released.set()

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers with the prompt, then with each token."""
        self._tokens += 1
        if self._tokens == HALFWAY:
            self._halfway.set()
            assert self._released.wait(WAIT_S), "nobody released this generation"

    def end(self) -> None:
        """The last token came."""

    def _run(self) -> None:
        with RemoteCausalLM.from_pretrained(
            self._model, initial_peers=[self._maddr], options=OPTIONS
        ) as remote:
            self._remote = remote
            while not self._over.is_set():
                assert self._generate(remote, self) == self._expected, f"round {self.rounds}"
                self.rounds += 1

    def _generate(
        self, model: PreTrainedModel | RemoteCausalLM, streamer: BaseStreamer | None = None
    ) -> list[int]:
        output = model.generate(self._prompt, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=streamer)
        return list(output[0].tolist())
