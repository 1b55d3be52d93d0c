"""Forward and backward passes equal transformers and torch's autograd, in any slicing, beside running sessions."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch

from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import PassRequest, Step
from petalsd.errors import BadRequest, DeadlineExceeded, EngineError, NotServed, Overloaded
from petalsd.types import BlockSpan
from tests.engine.rig import Gate, HookedBlock, TinyModel, opened, serving, states, with_hook
from tests.numeric import assert_close

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
SPAN = BlockSpan(1, 4)
SLICINGS = {
    "whole": EngineLimits(),
    "by rows": EngineLimits(max_pass_tokens=20),
    "one row": EngineLimits(max_pass_tokens=1),
}


def reference(
    model: TinyModel, hidden: torch.Tensor, prompts: torch.Tensor | None, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Output, gradient of the states and gradient of the prompts, every row's own, by one autograd graph."""
    hidden = hidden.clone().requires_grad_()
    if prompts is not None:
        prompts = prompts.expand(-1, hidden.shape[0], -1, -1).clone().requires_grad_()
    out = hidden
    for k, block in enumerate(SPAN):
        if prompts is not None:
            prefix = prompts.shape[2]
            out = torch.cat((out[:, :prefix] + prompts[k], out[:, prefix:]), dim=1)
        out = model.expected(out, BlockSpan(block, block + 1))
    out.backward(grad_output)
    assert hidden.grad is not None
    return out.detach(), hidden.grad, None if prompts is None else prompts.grad


@pytest.mark.parametrize("limits", SLICINGS.values(), ids=SLICINGS)
@pytest.mark.parametrize("prompt_rows", [None, 1, 3])
async def test_passes_equal_autograd(llama: TinyModel, limits: EngineLimits, prompt_rows: int | None) -> None:
    """Output and gradients equal one autograd graph over transformers' layers, however the rows are sliced."""
    hidden, grad_output = states(3, 10), states(3, 10, seed=1)
    prompts = (
        None
        if prompt_rows is None
        else torch.randn(3, prompt_rows, 4, 64, generator=torch.Generator().manual_seed(2))
    )
    output, grad_hidden, grad_prompts = reference(llama, hidden, prompts, grad_output)
    async with serving(llama, limits) as engine:
        actual = await engine.forward(PassRequest(SPAN, hidden, "p", prompts))
        actual_grad, actual_grad_prompts = await engine.backward(
            PassRequest(SPAN, hidden, "p", prompts, grad_output)
        )
    assert_close(actual, output, **TOLERANCE, what="output")
    assert_close(actual_grad, grad_hidden, **TOLERANCE, what="gradient of the states")
    assert (actual_grad_prompts is None) == (prompts is None)
    if actual_grad_prompts is not None and grad_prompts is not None:
        assert_close(actual_grad_prompts, grad_prompts, **TOLERANCE, what="gradient of the prompts")


async def test_empty_passes(llama: TinyModel) -> None:
    """Passes of zero tokens answer zero tokens; a prefix of zero tokens has gradients of that shape."""
    empty, prompts = states(2, 0), torch.zeros(3, 1, 0, 64)
    async with serving(llama) as engine:
        assert (await engine.forward(PassRequest(SPAN, empty, "p"))).shape == (2, 0, 64)
        grads = await engine.backward(PassRequest(SPAN, empty, "p", prompts, empty))
        full = await engine.backward(PassRequest(SPAN, states(2, 3), "p", prompts, states(2, 3)))
    assert [grad.shape for grad in grads if grad is not None] == [(2, 0, 64), (3, 2, 0, 64)]
    assert [grad.shape for grad in full if grad is not None] == [(2, 3, 64), (3, 2, 0, 64)]


async def test_steps_go_on_between_the_units_of_a_pass(llama: TinyModel) -> None:
    """A session decodes while a long pass is under way, and both get right answers."""
    hidden = states(1, 30)
    batch = states(40, 6, seed=3)
    step_waits = threading.Event()

    def be_slow(states: torch.Tensor) -> None:
        """Units of the pass take longer than a turn has time for, and run only where they hold a step up."""
        if states.dim() == 3:
            assert step_waits.wait(30)
            time.sleep(0.005)

    blocks, limits = with_hook(llama, SPAN.start, be_slow), EngineLimits(max_pass_tokens=6)
    async with serving(llama, limits, blocks=blocks) as engine, opened(engine) as session:
        a_pass = asyncio.create_task(engine.forward(PassRequest(SPAN, batch, "q")))
        answers = []
        for position in range(30):
            step_waits.set()
            answers.append(await session.step(Step(hidden[:, position : position + 1], position)))
            step_waits.clear()
        assert not a_pass.done(), "all units of the pass ran before 30 steps did"
        step_waits.set()
        output = await a_pass
    actual = torch.cat(answers, 1)
    assert_close(actual, llama.expected(hidden).detach(), **TOLERANCE, what="the session beside the pass")
    assert_close(
        output, llama.expected(batch, SPAN).detach(), **TOLERANCE, what="the pass beside the session"
    )


async def test_a_pass_is_not_starved_by_steps(llama: TinyModel) -> None:
    """A pass comes to its end while sessions keep the engine busy."""
    async with serving(llama) as engine, opened(engine) as one, opened(engine) as two:
        stop = asyncio.Event()

        async def keep_busy(session: Any) -> None:
            while not stop.is_set():
                await session.step(Step(states(1, 1), 0))

        busy = [asyncio.create_task(keep_busy(session)) for session in (one, two)]
        await engine.forward(PassRequest(SPAN, states(2, 5), "q"))
        stop.set()
        await asyncio.gather(*busy)


async def test_a_large_pass_does_not_hold_up_another_peers(llama: TinyModel) -> None:
    """A pass of many groups of rows lets another peer's small one go first, and both are right."""
    large, small = states(200, 6, seed=3), states(1, 6)
    async with serving(llama, EngineLimits(max_pass_tokens=6)) as engine:
        first = asyncio.create_task(engine.forward(PassRequest(SPAN, large, "p")))
        await asyncio.sleep(0)
        quick = await engine.forward(PassRequest(SPAN, small, "q"))
        assert not first.done(), "200 groups went before one of another peer"
        assert_close(quick, llama.expected(small, SPAN).detach(), **TOLERANCE, what="the small pass")
        assert_close(await first, llama.expected(large, SPAN).detach(), **TOLERANCE, what="the large pass")


async def test_long_rows_are_cut_while_a_session_decodes(llama: TinyModel) -> None:
    """A pass of long rows beside decode goes in parts, forward and backward, and is as right as in one piece."""
    hidden, grad_output = states(1, 400, seed=3), states(1, 400, seed=4)
    output, grad_hidden, _ = reference(llama, hidden, None, grad_output)
    async with serving(llama, EngineLimits(max_pass_tokens=64)) as engine, opened(engine) as session:
        running = asyncio.gather(
            engine.forward(PassRequest(SPAN, hidden, "q")),
            engine.backward(PassRequest(SPAN, hidden, "q", grad_output=grad_output)),
        )
        token = states(1, 1)
        while not running.done():
            await session.step(Step(token, 0))
        actual, (grad, _) = running.result()
    assert_close(actual, output, **TOLERANCE, what="output")
    assert_close(grad, grad_hidden, **TOLERANCE, what="gradient")


async def test_a_failing_pass_fails_alone(llama: TinyModel) -> None:
    """A pass whose blocks raise gets EngineError; the passes behind it run."""

    def fail_on_long(hidden: torch.Tensor) -> None:
        if hidden.shape[1] == 7:
            raise RuntimeError("boom")

    blocks = {**llama.blocks, 2: HookedBlock(llama.blocks[2], fail_on_long)}
    async with serving(llama, blocks=blocks) as engine:
        bad, good = await asyncio.gather(
            engine.forward(PassRequest(SPAN, states(1, 7), "p")),
            engine.forward(PassRequest(SPAN, states(1, 8), "p")),
            return_exceptions=True,
        )
        assert isinstance(bad, EngineError)
        assert_close(good, llama.expected(states(1, 8), SPAN).detach(), **TOLERANCE, what="the pass behind")


async def test_a_cancelled_pass_is_given_up(llama: TinyModel) -> None:
    """Cancelling stops a pass at the next unit, instead of computing it for nobody."""
    units = 0

    def count(hidden: torch.Tensor) -> None:
        nonlocal units
        units += 1
        if units == 2:
            loop.call_soon_threadsafe(task.cancel)
            cancelled.wait()

    cancelled = threading.Event()
    loop = asyncio.get_running_loop()
    blocks = {**llama.blocks, 1: HookedBlock(llama.blocks[1], count)}
    async with serving(llama, EngineLimits(max_pass_tokens=1), blocks) as engine:
        task = asyncio.create_task(engine.forward(PassRequest(SPAN, states(50, 2), "p")))
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled.set()
        assert engine.stats().queued_passes == 0
    assert units == 2


async def test_passes_have_a_deadline_and_a_bounded_queue(llama: TinyModel) -> None:
    """A pass over its deadline gets DeadlineExceeded; one more than max_queued_passes gets Overloaded."""
    release = threading.Event()
    blocks = {**llama.blocks, 1: HookedBlock(llama.blocks[1], lambda hidden: release.wait(30) and None)}
    limits = EngineLimits(pass_deadline_s=0.05, max_queued_passes=1)
    async with serving(llama, limits, blocks) as engine:
        request = PassRequest(SPAN, states(1, 2), "p")
        first = asyncio.create_task(engine.forward(request))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await engine.forward(request)
        with pytest.raises(DeadlineExceeded):
            await first
        release.set()


async def test_one_peers_passes_leave_places_to_others(llama: TinyModel, gate: Gate) -> None:
    """Half of them, so that a peer that sends more than is computed is refused, and not everybody."""
    limits = EngineLimits(max_queued_passes=4)
    async with serving(llama, limits, with_hook(llama, 1, gate)) as engine:
        request, other = (PassRequest(SPAN, states(1, 2), peer) for peer in ("greedy", "other"))
        passes = [asyncio.create_task(engine.forward(one)) for one in (request, request, other)]
        await gate.wait_until_reached()
        with pytest.raises(Overloaded, match="2 of them yours"):
            await engine.forward(request)
        passes.append(asyncio.create_task(engine.forward(other)))
        await asyncio.sleep(0)
        gate.opened.set()
        assert [len(answer) for answer in await asyncio.gather(*passes)] == [1] * 4


async def test_the_self_test_needs_no_place_among_the_passes(llama: TinyModel, gate: Gate) -> None:
    """It goes as a pass when sessions hold all pages; a full queue would look like an engine that has failed."""
    limits = EngineLimits(max_queued_passes=1)
    async with (
        serving(llama, limits, with_hook(llama, 1, gate), kv_tokens=64) as engine,
        opened(engine, max_tokens=64),
    ):
        waiting = asyncio.create_task(engine.forward(PassRequest(SPAN, states(1, 2), "p")))
        await gate.wait_until_reached()
        testing = asyncio.create_task(engine.self_test())
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(waiting, testing)


REFUSED = {
    "unserved": (PassRequest(BlockSpan(2, 5), states(1, 1), "p"), NotServed),
    "empty batch": (PassRequest(SPAN, states(0, 1), "p"), BadRequest),
    "two dimensions": (PassRequest(SPAN, states(1, 1)[0], "p"), BadRequest),
    "long row": (PassRequest(SPAN, states(1, 33), "p"), BadRequest),
    "prompts for two blocks": (PassRequest(SPAN, states(1, 5), "p", torch.zeros(2, 1, 1, 64)), BadRequest),
    "gradient in a forward": (PassRequest(SPAN, states(1, 5), "p", None, states(1, 5)), BadRequest),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refused_forward_passes(llama: TinyModel, name: str) -> None:
    """A pass outside the rules is refused by its proper error."""
    request, error = REFUSED[name]
    async with serving(llama, EngineLimits(max_session_tokens=32)) as engine:
        with pytest.raises(error):
            await engine.forward(request)


@pytest.mark.parametrize(
    "grad_output", [None, states(1, 4), states(1, 5).long()], ids=["none", "shape", "dtype"]
)
async def test_refused_backward_passes(llama: TinyModel, grad_output: torch.Tensor | None) -> None:
    """A backward pass needs output gradients that are floats of the states' shape."""
    async with serving(llama) as engine:
        with pytest.raises(BadRequest, match="grad_outputs"):
            await engine.backward(PassRequest(SPAN, states(1, 5), "p", None, grad_output))


@pytest.mark.parametrize("tokens", [1, 6])
async def test_backward_after_sessions_ran(llama: TinyModel, tokens: int) -> None:
    """What inference mode left in shared caches does not get into the way of gradients."""
    hidden = states(1, tokens)
    _, expected, _ = reference(llama, hidden, None, hidden)
    async with serving(llama) as engine, opened(engine) as session:
        answer = await session.step(Step(hidden, 0))
        await engine.forward(PassRequest(SPAN, answer, "p"))
        actual, _ = await engine.backward(PassRequest(SPAN, hidden, "p", None, hidden))
    assert_close(actual, expected, **TOLERANCE, what="gradient")
