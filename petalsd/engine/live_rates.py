"""What the requests of clients tell about the speed of the blocks, so that announced rates follow the machine.

Rates are those of one token, or one pass of 1024, that has the device to itself. Batches are of other sizes and
behind other contexts, so they are held against their work (``iteration_cost``): seconds for reading a block, and
for a token in it. Both begin with what was measured. Each window of half a minute teaches them the medians of its
samples, those of each size apart; a single slow batch changes nothing, a machine that got slower shows within
minutes. While nobody comes to show otherwise, what was learnt fades into what was measured.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median

from petalsd.engine.iteration_cost import AttentionShare, CostModel, Work
from petalsd.engine.observer import BatchReport, PassTiming
from petalsd.engine.throughput import PASS_TOKENS, BlockRates

WINDOW_S = 30.0
_KEPT = 4096
_STEPS, _PASSES = 16, 3  # how many samples of a size in a window say something
_LEFT = 0.9  # of what was learnt, after each window that taught nothing
_RECENT_WINDOWS = 20
_TOKEN = Work(1.0, 1.0)


class LiveRates:
    """Belongs to the loop, which tells it of batches and passes and asks it for rates."""

    def __init__(self, attention: AttentionShare, clock: Callable[[], float] = time.monotonic) -> None:
        self._pass = Work(1.0, attention.work(1, PASS_TOKENS, 0, 1).tokens)
        self._clock = clock
        self._measured: BlockRates | None = None
        self._steps: _Costs | None = None
        self._passes: _Costs | None = None
        self._window_end = 0.0

    def begin(self, measured: BlockRates) -> None:
        """Start from these, with nothing learnt."""
        token_s = 1 / measured.inference_rps
        read_s = token_s - min(1 / measured.forward_rps, token_s / 2)
        pass_s = PASS_TOKENS / measured.forward_rps
        pass_read_s = min(read_s, pass_s / 2)
        self._steps = _Costs(read_s, token_s - read_s, _STEPS)
        self._passes = _Costs(pass_read_s, (pass_s - pass_read_s) / self._pass.tokens, _PASSES)
        self._window_end = self._clock() + WINDOW_S
        self._measured = measured

    def batch_done(self, report: BatchReport) -> None:
        """Prefill says nothing of decode, and goes other ways than passes."""
        if self._steps is not None and not report.prefill_tokens:
            self._steps.add(report.work, report.duration_s)

    def pass_done(self, timing: PassTiming) -> None:
        if self._passes is not None and not timing.is_backward:
            self._passes.add(timing.work, timing.device_s)

    @property
    def is_live(self) -> bool:
        """Whether clients showed something lately."""
        return any(costs is not None and costs.is_recent for costs in (self._steps, self._passes))

    def rates(self) -> BlockRates:
        """As they are now; ValueError before ``begin``. Passes that nobody asks for slow down as steps do."""
        if self._measured is None or self._steps is None or self._passes is None:
            raise ValueError("there are no rates to begin with")
        self._close_windows(self._steps, self._passes)
        steps, passes = self._steps.slowdown(_TOKEN), self._passes.slowdown(self._pass)
        return BlockRates(
            self._measured.inference_rps / steps,
            self._measured.forward_rps / (passes if self._passes.is_recent else steps),
        )

    def _close_windows(self, *all_costs: _Costs) -> None:
        """Those that ended since the last time; what was seen in several of them counts as seen in one."""
        num_ended = math.floor((self._clock() - self._window_end) / WINDOW_S) + 1
        if num_ended > 0:
            self._window_end += num_ended * WINDOW_S
            for costs in all_costs:
                costs.learn(num_ended)


class _Costs:
    """Seconds of work as they were at the start, and as samples show them now."""

    def __init__(self, read_s: float, token_s: float, num_enough: int) -> None:
        self._start = CostModel.starting_from(read_s, token_s)
        self._now = CostModel.starting_from(read_s, token_s)
        self._num_enough = num_enough
        self._samples: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        self._windows_since = _RECENT_WINDOWS

    @property
    def is_recent(self) -> bool:
        return self._windows_since < _RECENT_WINDOWS

    def add(self, work: Work, seconds: float) -> None:
        """Tokens and seconds for each read of a block; what ran otherwise than planned has no work."""
        if work.reads > 0 and work.tokens > 0 and seconds > 0:
            self._samples.append((work.tokens / work.reads, seconds / work.reads))

    def learn(self, num_windows: int) -> None:
        """Close so many windows."""
        lessons = list(self._lessons())
        for tokens, seconds in lessons:
            self._now.observe(Work(1.0, tokens), seconds)
        if lessons:
            self._windows_since = 0
        else:
            self._windows_since += num_windows
            self._fade(_LEFT**num_windows)

    def slowdown(self, work: Work) -> float:
        return self._now.seconds(work) / self._start.seconds(work)

    def _lessons(self) -> Iterator[tuple[float, float]]:
        """The medians of tokens and of seconds, for sizes that differ by less than a factor of two together.

        The smallest come last: what one token takes is best learnt from few.
        """
        sizes: dict[int, list[tuple[float, float]]] = {}
        for _ in range(len(self._samples)):
            tokens, seconds = self._samples.popleft()
            sizes.setdefault(round(math.log2(tokens)), []).append((tokens, seconds))
        for _, samples in sorted(sizes.items(), reverse=True):
            if len(samples) >= self._num_enough:
                yield median(tokens for tokens, _ in samples), median(seconds for _, seconds in samples)

    def _fade(self, left: float) -> None:
        start, now = self._start, self._now
        now.read_s = start.read_s + (now.read_s - start.read_s) * left
        now.token_s = start.token_s + (now.token_s - start.token_s) * left
