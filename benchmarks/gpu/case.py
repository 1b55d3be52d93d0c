"""What is measured of a kernel, and the rows that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.report import OURS, Row, Setting
from benchmarks.timing import Work, summarize

TIME = "kernel"
RATE = "kernel rate"
ERROR = "error"
# Norm of the difference over the norm of the float32 reference: what rounding inputs and results costs.
TOLERANCES = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@dataclass(frozen=True, slots=True)
class Site:
    """Where kernels run: on ``device``, in ``dtype``, at the shapes of ``SHAPES`` divided by ``scale``.

    num_sms  multiprocessors of the device
    samples  of each measurement
    """

    device: torch.device
    dtype: torch.dtype
    num_sms: int
    scale: int = 1
    samples: int = 50

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(self.dtype)

    def ints(self, values: list[int] | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(values).to(self.device, torch.int32)


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one setting.

    run      launches it
    errors   compares the last run's results with float32: each result's error
    nbytes   that it must move at least
    flops    of its products
    rivals   other providers' work on the same
    skipped  rivals that are not there, and why
    """

    kernel: str
    setting: Setting
    run: Work
    errors: Callable[[], list[float]]
    nbytes: int
    flops: int = 0
    rivals: Mapping[str, Work] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def measure(case: Case, site: Site, clock: Clock) -> Iterator[Row]:
    """First whether it is right, then how long it takes, then the rivals."""
    setting = {"kernel": case.kernel, **case.setting}
    case.run()
    error = max(case.errors())
    yield Row(OURS, {**setting, "tolerance": f"{TOLERANCES[site.dtype]:g}"}, ERROR, "x", summarize([error]))
    for provider, work in {OURS: case.run, **case.rivals}.items():
        seconds = clock.seconds(work, site.samples)
        yield Row(provider, setting, TIME, "us", summarize([1e6 * each for each in seconds]), case.nbytes)
        if case.flops:
            rates = summarize([case.flops / each / 1e12 for each in seconds])
            yield Row(provider, setting, RATE, "TFLOP/s", rates)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite for values that are not finite."""
    difference = (actual.float() - expected.float()).norm() / expected.float().norm()
    return float(difference) if bool(actual.isfinite().all()) else float("inf")
