"""A device and its clients, simulated: the scheduler's promises on times that nobody has to wait for."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from petalsd.engine.fair_queue import Job
from petalsd.engine.gathering import Gathering
from petalsd.engine.iteration_cost import AttentionShare
from petalsd.engine.scheduler import Scheduler

NUM_BLOCKS = 30
FIXED_S = 0.010  # an iteration of no rows: reading the weights
TOKEN_S = 0.0004


@dataclass
class Device:
    """Takes ``FIXED_S`` for an iteration and ``TOKEN_S`` for each of its tokens; slower with prefill by a factor.

    ``noise`` is the standard deviation of a factor on both; one iteration in 200 takes five times as long then.
    """

    noise: float = 0.0
    prefill_factor: float = 1.0
    pair: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def seconds(self, decode_rows: int, chunks: list[tuple[int, int]]) -> float:
        """``chunks`` are pairs of tokens and of the context before them."""
        tokens = sum(n * (1 + self.pair * (context + n / 2)) for n, context in chunks)
        seconds = FIXED_S + TOKEN_S * (decode_rows + tokens)
        if chunks:
            seconds *= self.prefill_factor
        if not self.noise:
            return seconds
        hiccup = 5.0 if self.random.random() < 0.005 else 1.0
        return seconds * hiccup * max(0.5, self.random.gauss(1.0, self.noise))


@dataclass
class Decoder:
    """Hands in its next token ``away_s`` after the answer to the one before."""

    key: int
    away_s: float
    due_at: float = 0.0
    waits: list[float] = field(default_factory=list)


class Simulation:
    """Time passes only where the device works, where a batch gathers, or where everybody waits for a client."""

    def __init__(self, device: Device, decoders: list[Decoder], gathers: bool = False) -> None:
        self.device = device
        self.scheduler = Scheduler(1024, 256, AttentionShare(0.0, device.pair))
        self.gathering = Gathering() if gathers else None
        self.decoders = {decoder.key: decoder for decoder in decoders}
        self.now = 0.0
        self.prefills: dict[int, Job] = {}
        self.finished: dict[int, float] = {}
        self.iterations: list[float] = []
        self.pass_s = 0.0
        self._arrived: dict[int, float] = {}

    def prefill(self, key: int, tokens: int, peer: str = "prefill", context: int = 0) -> None:
        """Hand in a long step."""
        job = Job(key, peer, 1, tokens, NUM_BLOCKS, context, self.now)
        self.prefills[key] = job
        self.scheduler.add(job)

    def forget_waits(self) -> None:
        for decoder in self.decoders.values():
            decoder.waits.clear()

    def waits(self) -> list[float]:
        return sorted(wait for decoder in self.decoders.values() for wait in decoder.waits)

    def run(self, iterations: int, has_pass: bool = False) -> None:
        for _ in range(iterations):
            self.iterate(has_pass)

    def iterate(self, has_pass: bool = False) -> None:
        """One turn of the engine; passes take exactly the time that they are given."""
        if not self.scheduler and not has_pass and not self._is_anybody_due():
            self.now = min(decoder.due_at for decoder in self.decoders.values())
        self._hand_in()
        self._gather()
        contexts = {key: job.context for key, job in self.prefills.items()}
        plan = self.scheduler.schedule(self.now, has_pass)
        chunks = [(piece.tokens, contexts[piece.key]) for piece in plan.slices if piece.key in self.prefills]
        if plan.slices:
            seconds = self.device.seconds(len(plan.slices) - len(chunks), chunks)
            self.now += seconds
            self.iterations.append(seconds)
            self.scheduler.ran(seconds)
            if self.gathering is not None:
                self.gathering.ran(self.scheduler.undisturbed_s, self.now, bool(self.scheduler))
        for piece in plan.slices:
            if piece.is_last:
                self._answer(piece.key)
        if plan.pass_s is not None:
            self.pass_s += plan.pass_s
            self.now += plan.pass_s

    def _gather(self) -> None:
        """Wait as the engine thread does: until the pause is over, asking again whenever somebody came."""
        while self.gathering is not None and (pause_s := self.gathering.pause_s(self.now)) > 0:
            coming = [one.due_at for one in self.decoders.values() if one.due_at > self.now]
            self.now = min([*coming, self.now + pause_s])
            self._hand_in()

    def _is_anybody_due(self) -> bool:
        return any(decoder.due_at <= self.now for decoder in self.decoders.values())

    def _hand_in(self) -> None:
        for decoder in self.decoders.values():
            if decoder.key not in self._arrived and decoder.due_at <= self.now:
                self._arrived[decoder.key] = decoder.due_at
                job = Job(decoder.key, f"peer-{decoder.key}", 1, 1, NUM_BLOCKS, arrived_at=decoder.due_at)
                self.scheduler.add(job)
                if self.gathering is not None:
                    self.gathering.arrived(decoder.key, decoder.due_at)

    def _answer(self, key: int) -> None:
        decoder = self.decoders.get(key)
        if decoder is None:
            del self.prefills[key]
            self.finished[key] = self.now
            return
        decoder.waits.append(self.now - self._arrived.pop(key))
        decoder.due_at = self.now + decoder.away_s
        if self.gathering is not None:
            self.gathering.answered(key, self.now)
