"""The engine thread's side of a session: its pages, its position and the step it is at."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import torch

from petalsd.engine.batch import BatchItem
from petalsd.engine.step import SessionSpec, Step
from petalsd.kvcache.session import KVSession


@dataclass(slots=True)
class StepJob:
    """A step on its way through the engine, possibly in several chunks.

    arrived_at  when it was handed in (``time.monotonic``)
    begun_at    when its first token's turn came, likewise
    hidden      ``[B, n, M]``, once loaded in the model's dtype, on the CPU
    prompts     None, or ``[len(span), B or 1, prefix, M]``, likewise, on the device
    num_tokens  n
    num_done    tokens of each row computed so far
    output      ``[B, n, M]`` on the CPU, filled as chunks come; None while nothing is
    """

    step: Step
    answer: asyncio.Future[torch.Tensor]
    arrived_at: float
    hidden: torch.Tensor
    prompts: torch.Tensor | None
    num_tokens: int
    begun_at: float = 0.0
    num_done: int = 0
    output: torch.Tensor | None = None

    @classmethod
    def of(cls, step: Step, answer: asyncio.Future[torch.Tensor]) -> StepJob:
        """Of a checked step that was handed in just now."""
        prompts = step.prompts if step.prompts is not None and step.prompts.shape[2] else None
        return cls(step, answer, time.monotonic(), step.hidden, prompts, step.hidden.shape[1])

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        """Cast the tensors, and move the prompts; the states go to the device with those of their batch."""
        if self.hidden.dtype != dtype:
            self.hidden = self.hidden.to(dtype)
        if self.prompts is not None:
            self.prompts = self.prompts.to(device, dtype)


@dataclass(slots=True)
class EngineSession:
    """``position`` is the tokens of each row that are in the pages; ``job`` the step that is not answered yet."""

    key: int
    spec: SessionSpec
    kv: KVSession
    position: int = 0
    job: StepJob | None = field(default=None, repr=False)

    def rewind(self, step: Step) -> None:
        """Roll back to the start of a step and reorder the rows. Both act on whole rows, so they commute."""
        if step.start < self.position:
            self.kv.truncate(step.start)
            self.position = step.start
        if step.hypo_ids is not None:
            self.kv.reorder(step.hypo_ids)

    def resume_at(self, position: int) -> None:
        """Its pages were filled by transfers, perhaps beyond: their session was rolled back meanwhile."""
        if self.kv.length > position:
            self.kv.truncate(position)
        self.position = position

    def next_item(self, tokens: int) -> BatchItem:
        """Make room for the next ``tokens`` tokens of each row, and return them as a share of a batch."""
        job = self._current_job()
        done = job.num_done
        self.kv.extend(self.position + tokens)
        prompts = job.prompts
        if prompts is not None:
            prompts = prompts[:, :, done : done + tokens] if done < prompts.shape[2] else None
        hidden = job.hidden if tokens == job.num_tokens else job.hidden[:, done : done + tokens]
        return BatchItem(
            span=self.spec.span,
            kv=self.kv,
            rows=self.spec.batch,
            start=self.position,
            tokens=tokens,
            step_end=job.step.start + job.num_tokens,
            hidden=hidden.reshape(-1, hidden.shape[-1]),
            prompts=prompts,
            adapter=self.spec.adapter,
        )

    def accept(self, states: torch.Tensor) -> torch.Tensor | None:
        """Take ``[B * tokens, M]`` that were computed; returns ``[B, n, M]`` when the step is complete."""
        job = self._current_job()
        states = states.view(self.spec.batch, -1, states.shape[1])
        tokens = states.shape[1]
        self.position += tokens
        if tokens == job.num_tokens:
            self.job = None
            return states
        if job.output is None:
            job.output = states.new_empty(job.step.hidden.shape)
        job.output[:, job.num_done : job.num_done + tokens] = states
        job.num_done += tokens
        if job.num_done < job.num_tokens:
            return None
        self.job = None
        return job.output

    def _current_job(self) -> StepJob:
        if self.job is None:
            raise RuntimeError(f"session {self.key} has no step to work on")
        return self.job
