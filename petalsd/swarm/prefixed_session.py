"""A client's session that takes from the prefix cache what was computed of its prompt before."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator

import structlog
import torch

from petalsd.engine.handle import Session
from petalsd.engine.kv_transfer import KeysValues, Place
from petalsd.engine.step import Step
from petalsd.errors import EngineError, PetalsdError, SpillError
from petalsd.kvcache.prefixes import SEGMENT_TOKENS, PrefixCache, Segment, chain_digests, chain_start
from petalsd.swarm.observer import SwarmObserver
from petalsd.swarm.off_loop import off_loop

log = structlog.get_logger(__name__)

_FINISH_S = 1.0  # that the pages of a session may be held for it after its last step


class PrefixedSession:
    """Steps of ``session``, of which ``cache`` learns as they go on. Belongs to the loop.

    What is found was computed for the same client: others could learn from the time of an answer what it asked.
    """

    def __init__(self, session: Session, cache: PrefixCache, observer: SwarmObserver) -> None:
        self.session = session
        self._cache = cache
        self._observer = observer
        spec, is_new = session.spec, session.position == 0  # what was handed to us has come elsewhere
        # Of all tokens so far, as long as they are whole segments of a prompt, which may come in several steps.
        self._link = chain_start(f"{spec.peer} {spec.span} {spec.adapter}") if is_new else None
        self._unchanged = 0  # tokens from the start that are what the prompt brought
        self._saving: asyncio.Task[None] | None = None

    async def step(self, step: Step) -> torch.Tensor:
        """As of ``Session.step``, with the same errors. It was checked against the session."""
        link, self._link = self._link, None
        if link is None or not self._is_prompt(step):
            self._unchanged = 0 if step.hypo_ids is not None else min(self._unchanged, step.start)
            return await self.session.step(step)
        digests = await off_loop(step.hidden.nbytes, chain_digests, link, step.hidden)
        known = self._cache.find(digests)
        if not await self._refill(step.start, known):
            known = []
        output = await self._compute(step, known)
        self._count(step, len(known))
        self._unchanged = step.start + step.hidden.shape[1]
        if self._unchanged % SEGMENT_TOKENS == 0:
            self._link = digests[-1]
        self._saving = asyncio.create_task(
            self._save(self._saving, step.start, digests, output), name="prefix saving"
        )
        return output

    def _is_prompt(self, step: Step) -> bool:
        is_plain = step.hypo_ids is None and (step.prompts is None or not step.prompts.shape[2])
        is_next = step.start == self.session.position and step.hidden.shape[1] >= SEGMENT_TOKENS
        return is_plain and is_next and self._cache.max_bytes > 0 and self.session.is_prefix_stable

    def _count(self, step: Step, num_known: int) -> None:
        rows, tokens, _ = step.hidden.shape
        reused = rows * num_known * SEGMENT_TOKENS
        self._cache.tokens_seen += rows * tokens
        self._cache.tokens_reused += reused
        self._observer.prompt_began(rows * tokens, reused)

    # What is known already

    async def _refill(self, start: int, known: list[Segment]) -> bool:
        """Fill the session with these segments from ``start`` on; False where it cannot be, and stays there."""
        if not known:
            return True
        places = range(start, start + len(known) * SEGMENT_TOKENS, SEGMENT_TOKENS)
        # All at once: the engine takes as many between two batches as go in little time.
        writes = [
            write for at, segment in zip(places, known, strict=True) for write in self._writes(at, segment)
        ]
        results = await asyncio.gather(*writes, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures:
            if not isinstance(failure, EngineError) or isinstance(failure, SpillError):
                self.session.end(f"its prompt could not be taken from the cache: {failure}")
                raise failure
        self.session.resume_at(start if failures else places.stop)
        if failures:
            log.info("prefix_not_reused", error=str(failures[0]))
        return not failures

    def _writes(self, start: int, segment: Segment) -> Iterator[Coroutine[None, None, None]]:
        for place, part in self._parts(start):
            yield self.session.write_kv(place, (segment.keys[part], segment.values[part]))

    def _parts(self, start: int) -> Iterator[tuple[Place, tuple[slice, ...]]]:
        """The chunks of the segment at ``start``, and which part of its keys and values each of them is."""
        first = self.session.spec.span.start
        for place in self.session.chunks.places(range(start, start + SEGMENT_TOKENS)):
            blocks = slice(place.blocks.start - first, place.blocks.end - first)
            yield place, (blocks, slice(None), slice(place.start - start, place.end - start))

    async def _compute(self, step: Step, known: list[Segment]) -> torch.Tensor:
        """The answer to the whole step, of which the beginning is known."""
        if not known:
            return await self.session.step(step)
        done = len(known) * SEGMENT_TOKENS
        parts = [segment.states for segment in known]
        if done < step.hidden.shape[1]:
            parts.append(await self.session.step(Step(step.hidden[:, done:], step.start + done)))
        return await off_loop(sum(part.nbytes for part in parts), torch.cat, parts, 1)

    # What is learned

    async def _save(
        self, before: asyncio.Task[None] | None, start: int, digests: list[bytes], output: torch.Tensor
    ) -> None:
        """Keep what the cache lacks of a step, segment after segment, beside the session's next steps."""
        if before is not None:
            await before
        try:
            for number, digest in enumerate(digests):
                at = number * SEGMENT_TOKENS
                states = output[:, at : at + SEGMENT_TOKENS]
                if digest not in self._cache and not await self._save_one(start + at, digest, states):
                    break
        except PetalsdError as error:  # also what the session ended with
            log.debug("prefix_not_kept", error=str(error))
        except Exception as error:  # for want of memory, say: the session goes on without
            log.warning("prefix_not_kept", exc_info=error)
        self._cache.touch(digests)

    async def _save_one(self, start: int, digest: bytes, states: torch.Tensor) -> bool:
        """Whether the next one is worth a try."""
        keys, values = await self._read(start)
        end = start + SEGMENT_TOKENS
        if end > self._unchanged:  # a step that came meanwhile has brought others there
            return False
        segment = Segment(keys, values, states.clone())
        return end <= self._cache.room_for(segment) and self._cache.put(digest, segment)

    async def _read(self, start: int) -> KeysValues:
        spec, geometry = self.session.spec, self.session.kv_geometry
        shape = (len(spec.span), spec.batch, SEGMENT_TOKENS, geometry.num_kv_heads, geometry.head_dim)
        keys, values = (torch.empty(shape, dtype=self.session.dtype) for _ in range(2))
        for place, part in self._parts(start):
            keys[part], values[part] = await self.session.read_kv(place)
        return keys, values

    async def finish(self) -> None:
        """The client has ended the session: wait a little for what is still being saved."""
        if self._saving is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FINISH_S):
                    await self._saving

    def stop(self) -> None:
        """Save no more."""
        if self._saving is not None:
            self._saving.cancel()
