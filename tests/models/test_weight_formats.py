"""What the forms of weights and cache cost on real weights and a real text, through the code that serves them.

Figures over the whole text stand in docs/quantization.md; the bounds here are for a part of it, and leave room for
other processors' kernels.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.models.demo_numerics import BFLOAT16, FLOAT32, FORMS, INT4, INT8, INT8_KV, DemoNumerics, Form
from tests.tiers import nightly_except

pytestmark = [pytest.mark.slow, pytest.mark.demo_model, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def perplexity(numerics: DemoNumerics) -> float:
    """Of float32."""
    return numerics.perplexity(FLOAT32)


def test_perplexity_in_float32_is_transformers(
    numerics: DemoNumerics, perplexity: float, demo_model: Path
) -> None:
    """The figure that the others are compared with is transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(numerics.ids[None, :-1]).logits[0]
    expected = math.exp(functional.cross_entropy(logits, numerics.ids[1:]))
    assert perplexity == pytest.approx(expected, rel=1e-3)


MOST = {"none": 1.01, "int8": 1.015, "int4": 1.35}
"""Perplexity against that of float32; int4 costs so small a model a quarter."""


@pytest.mark.parametrize("form", nightly_except(FORMS[1:], BFLOAT16, INT4), ids=str)
def test_perplexity_of_a_form(numerics: DemoNumerics, perplexity: float, form: Form) -> None:
    """About 1 % in bfloat16 and int8, whatever the cache is kept in."""
    assert 0.99 < numerics.perplexity(form) / perplexity < MOST[form.quantization]


@pytest.mark.parametrize(
    ("form", "of_output", "of_added", "mean_of_added"),
    [
        (BFLOAT16, 0.015, 0.15, 0.04),
        pytest.param(INT8, 0.03, 0.07, 0.045, marks=pytest.mark.nightly),
        (INT4, 0.15, 0.55, 0.30),
        pytest.param(INT8_KV, 0.01, 0.04, 0.02, marks=pytest.mark.nightly),
    ],
    ids=["bfloat16", "int8", "int4", "int8-kv"],
)
def test_errors_of_single_blocks(
    numerics: DemoNumerics, form: Form, of_output: float, of_added: float, mean_of_added: float
) -> None:
    """Every block on the states that enter it in float32: of its output, and of what it adds to its input."""
    errors = numerics.block_errors(form)
    assert len(errors) == numerics.config.num_blocks
    assert max(error.of_output for error in errors) < of_output
    assert max(error.of_added for error in errors) < of_added
    assert mean(error.of_added for error in errors) < mean_of_added
    assert min(error.of_output for error in errors) > 0


ALLOCATOR_BYTES = 4 << 20  # what malloc cannot give back, for something in the same page is still in use

LOAD_AND_PASS = """
import ctypes, sys, torch
from petalsd.models.block_config import BlockConfig
from petalsd.models.rope import Rope
from petalsd.models.source import ModelSource
from petalsd.models.weights import load_block

def own_bytes():
    ctypes.CDLL(None).malloc_trim(0)  # or blocks would move into what the first one left behind
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(status["RssAnon"].split()[0])

source, dtype, device = ModelSource(sys.argv[1]), torch.bfloat16, torch.device("cpu")
config = BlockConfig.from_hf(source.config())
rope = Rope(config, dtype, device)

def load(index):
    return load_block(source, config, index, dtype, device, rope=rope, quantization=sys.argv[2])

def differentiate(block):
    states = torch.ones(1, 16, config.hidden_size, dtype=dtype, requires_grad=True)
    block.forward_dense(states).sum().backward()

differentiate(load(0))  # whatever the first use of something takes
before = own_bytes()
blocks = [load(index) for index in range(config.num_blocks)]
loaded = own_bytes() - before
for block in blocks:
    differentiate(block)
print(sum(block.nbytes for block in blocks), loaded, own_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: /proc/self/status")
@pytest.mark.nightly
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_weights_are_held_once(demo_model: Path, quantization: str) -> None:
    """A process grows by at most 1.15 times the weights' bytes; passes through all blocks leave little behind."""
    child = subprocess.run(
        [sys.executable, "-c", LOAD_AND_PASS, str(demo_model), quantization],
        capture_output=True, text=True, check=True, timeout=150,
    )  # fmt: skip
    weights, loaded, used = map(int, child.stdout.splitlines()[-1].split())
    assert 0.9 * weights < loaded < 1.15 * weights
    assert used < 1.15 * weights + ALLOCATOR_BYTES
