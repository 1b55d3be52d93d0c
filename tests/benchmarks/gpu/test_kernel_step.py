"""The step that is measured is the one that serves: by the kernels of a span, in the interpreter."""

from __future__ import annotations

import torch

from benchmarks.gpu.block_cases import Model, make_step
from benchmarks.gpu.verdict import MAX_LAUNCHES
from petalsd.ops.launching import record_launches
from tests.benchmarks.gpu.doubles import SITE, TINY
from tests.benchmarks.gpu.test_suite import capturing


def test_a_step_by_the_kernels_that_serve() -> None:
    """Replays of it equal launches, of both blocks together and one by one."""
    torch.manual_seed(0)
    model = Model.draw(SITE, TINY, "bfloat16", 2)
    with torch.inference_mode(), record_launches() as launches:
        step = make_step(SITE, model, 2, 70)
        step.enter()
        step.compute_all()
    assert 0 < len(launches) / 2 <= MAX_LAUNCHES
    with torch.inference_mode():
        assert step.parity(capturing()) == 0.0
        assert step.parity(capturing(is_broken=True)) > 0.1
