"""Passes through servers in memory: values and gradients equal local autograd, whoever fails."""

from __future__ import annotations

import pytest
import torch

from petalsd.client.autograd import remote_blocks
from petalsd.client.options import ClientOptions
from petalsd.client.passes import SwarmPasses
from petalsd.client.runtime import ClientRuntime
from petalsd.errors import BadRequest, RemoteFailure
from petalsd.types import BlockSpan
from tests.client.fake_swarm import (
    HIDDEN,
    FakeServer,
    FakeSwarm,
    dies_at,
    make_span,
    refuses_from,
    run_blocks,
)

BLOCKS = BlockSpan(0, 6)
QUICK = ClientOptions(
    min_backoff_s=0.001, max_backoff_s=0.002, recovery_timeout_s=5.0, max_failures=4, max_step_tokens=10
)


def make_passes(swarm: FakeSwarm, blocks: BlockSpan = BLOCKS, options: ClientOptions = QUICK) -> SwarmPasses:
    return SwarmPasses(swarm, swarm, "tiny", blocks, options)


def two_halves() -> tuple[FakeServer, FakeServer]:
    return FakeServer(make_span("a", 0, 3)), FakeServer(make_span("b", 3, 6))


def assert_same(actual: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(5, 4, HIDDEN, generator=generator),
        "grad": torch.randn(5, 4, HIDDEN, generator=generator),
        "own": torch.randn(6, 5, 2, HIDDEN, generator=generator),
        "shared": torch.randn(6, 1, 2, HIDDEN, generator=generator),
    }


def expected_gradients(
    hidden: torch.Tensor, grad: torch.Tensor, prompts: torch.Tensor | None
) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, prompts) if tensor is not None]
    return list(torch.autograd.grad(run_blocks(BLOCKS, *leaves), leaves, grad))


async def test_forward_splits_rows_and_keeps_their_order(inputs: dict[str, torch.Tensor]) -> None:
    """Five rows of four tokens go in pieces of two rows, and come back in order."""
    swarm = FakeSwarm(*two_halves())
    trace = await make_passes(swarm).forward(inputs["hidden"])
    assert_same(trace.output, run_blocks(BLOCKS, inputs["hidden"]))
    assert len(swarm.servers["a"].passes) == len(trace.pieces) == 3


@pytest.mark.parametrize("kind", [None, "own", "shared"])
async def test_backward_equals_local_gradients(kind: str | None, inputs: dict[str, torch.Tensor]) -> None:
    """For the inputs and for prompts of each row or of all rows."""
    prompts = None if kind is None else inputs[kind]
    passes = make_passes(FakeSwarm(*two_halves()))
    trace = await passes.forward(inputs["hidden"], prompts)
    grads = await passes.backward(trace, inputs["grad"], prompts)
    expected = expected_gradients(inputs["hidden"], inputs["grad"], prompts)
    assert_same(grads[0], expected[0])
    if prompts is None:
        assert grads[1] is None
    else:
        assert_same(grads[1], expected[1])


@pytest.mark.parametrize("step", range(1, 8))
@pytest.mark.parametrize("lost", ["a", "b"])
async def test_lost_servers_do_not_change_values(
    lost: str, step: int, inputs: dict[str, torch.Tensor]
) -> None:
    """A server lost in any call, forward or backward, is replaced by several."""
    spares = [FakeServer(make_span(f"s{i}", 2 * i, 2 * i + 2)) for i in range(3)]
    swarm = FakeSwarm(*two_halves(), *spares)
    swarm.servers[lost].before_step = dies_at(step)
    passes = make_passes(swarm)
    trace = await passes.forward(inputs["hidden"], inputs["shared"])
    grads = await passes.backward(trace, inputs["grad"], inputs["shared"])
    expected = expected_gradients(inputs["hidden"], inputs["grad"], inputs["shared"])
    assert_same(trace.output, run_blocks(BLOCKS, inputs["hidden"], inputs["shared"]))
    assert_same(grads[0], expected[0])
    assert_same(grads[1], expected[1])


async def test_a_refusal_stops_all_pieces(inputs: dict[str, torch.Tensor]) -> None:
    """It is raised as it came, not as a group of errors."""
    server = FakeServer(make_span("a", 0, 6), before_step=refuses_from(2, "BadRequest('prompts = 1: no')"))
    with pytest.raises(RemoteFailure, match="prompts = 1"):
        await make_passes(FakeSwarm(server)).forward(inputs["hidden"])


async def test_answers_of_a_wrong_shape_are_failures(inputs: dict[str, torch.Tensor]) -> None:
    """A server that answers something else is left for another."""
    liar = FakeServer(make_span("liar", 0, 6))

    async def forward(*_: object) -> list[torch.Tensor]:
        return [torch.zeros(1, 1, HIDDEN)]

    liar.forward = forward  # type: ignore[method-assign,assignment]
    swarm = FakeSwarm(liar, FakeServer(make_span("z", 0, 6)))
    trace = await make_passes(swarm).forward(inputs["hidden"][:1])
    assert_same(trace.output, run_blocks(BLOCKS, inputs["hidden"][:1]))
    assert swarm.failures == ["liar"]


def test_remote_blocks_are_differentiable(inputs: dict[str, torch.Tensor]) -> None:
    """Blocking code trains what stands before the blocks, and prompts, through ordinary autograd."""
    hidden = inputs["hidden"].clone().requires_grad_()
    prompts = inputs["shared"].clone().requires_grad_()
    with ClientRuntime() as runtime:
        passes = make_passes(FakeSwarm(*two_halves()))
        remote_blocks(runtime, passes, hidden, prompts).backward(inputs["grad"])
    expected = expected_gradients(inputs["hidden"], inputs["grad"], inputs["shared"])
    assert_same(hidden.grad, expected[0])
    assert_same(prompts.grad, expected[1])


@pytest.mark.parametrize(
    "shape", [(5, 5, 2, 8), (7, 5, 2, 8), (6, 4, 2, 8), (6, 5, 5, 8), (6, 5, 2, 4), (5, 2, 8)]
)
def test_prompts_that_do_not_fit_are_refused(inputs: dict[str, torch.Tensor], shape: tuple[int, ...]) -> None:
    """Before a server is asked, and avoided for its answer; one block too many would be dropped."""
    swarm = FakeSwarm(*two_halves())
    with (
        ClientRuntime() as runtime,
        pytest.raises(BadRequest, match=r"prompts are \[6, 5 or 1, at most 4, 8\]"),
    ):
        remote_blocks(runtime, make_passes(swarm), inputs["hidden"], torch.zeros(shape))
    assert not swarm.servers["a"].passes


def test_prompts_of_no_length(inputs: dict[str, torch.Tensor]) -> None:
    """They add nothing; a server has no gradient for them, which was waited for."""
    hidden, prompts = (
        inputs["hidden"].clone().requires_grad_(),
        torch.zeros(6, 5, 0, HIDDEN, requires_grad=True),
    )
    with ClientRuntime() as runtime:
        passes = make_passes(FakeSwarm(*two_halves()))
        remote_blocks(runtime, passes, hidden, prompts).backward(inputs["grad"])
    assert_same(hidden.grad, expected_gradients(inputs["hidden"], inputs["grad"], None)[0])
