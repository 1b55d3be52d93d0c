"""Where tests compute that can do so in two places: ``PETALSD_TEST_DEVICE``, the CPU unless it says cuda.

On the CPU kernels run in Triton's interpreter, on a GPU they are compiled: tests of kernels (``tests/kernels``)
and of daemons (``tests/daemon``) then show what a card does.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("PETALSD_TEST_DEVICE", "cpu"))

interpreted = pytest.mark.skipif(DEVICE.type != "cpu", reason="of the interpreter: kernels are compiled here")
