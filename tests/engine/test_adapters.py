"""Sessions and passes with adapters beside others. An adapter is played by the blocks of another random model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import pytest

from petalsd.engine.engine import Engine
from petalsd.engine.handle import Session
from petalsd.engine.observer import NullObserver
from petalsd.engine.step import PassRequest, SessionSpec, Step
from petalsd.errors import NotServed
from petalsd.types import BlockSpan
from tests.engine import kernel_rig
from tests.engine.recorded_graphs import LaunchedGraphs
from tests.engine.rig import TinyModel, feed, serving, states
from tests.numeric import assert_close

ADAPTERS = ("left", "right")


@dataclass
class Adapted:
    """``models``: whose answers are expected, by the adapter that is asked for."""

    models: dict[str | None, TinyModel]

    @property
    def base(self) -> TinyModel:
        return self.models[None]

    @contextmanager
    def loaded(self) -> Iterator[TinyModel]:
        """The base model with its adapters; it is others' fixture, too."""
        for index, block in self.base.blocks.items():
            block.adapted = {name: self.models[name].blocks[index] for name in ADAPTERS}
        try:
            yield self.base
        finally:
            for block in self.base.blocks.values():
                block.adapted = {}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    names = (None, *ADAPTERS)
    return Adapted(
        {name: TinyModel(tmp_path_factory.mktemp(str(name)), seed=seed) for seed, name in enumerate(names)}
    )


@asynccontextmanager
async def opened(engine: Engine, span: BlockSpan, adapter: str | None) -> AsyncIterator[Session]:
    session = await engine.open_session(SessionSpec(span, 1, 64, str(adapter), adapter=adapter))
    try:
        yield session
    finally:
        await session.close()


WORK = [
    (None, BlockSpan(0, 4)),
    ("left", BlockSpan(0, 4)),
    ("right", BlockSpan(1, 3)),
    ("left", BlockSpan(2, 4)),
]


async def run(engine: Engine, adapted: Adapted) -> None:
    """Prefill in chunks and decode steps of all of ``WORK`` at once."""

    async def one(number: int, adapter: str | None, span: BlockSpan) -> None:
        hidden = states(1, 14, seed=number)
        async with opened(engine, span, adapter) as session:
            answer = await feed(session, hidden, [9, 1, 1, 1, 1, 1])
        expected = adapted.models[adapter].expected(hidden, span).detach()
        assert_close(answer, expected, 1e-4, 1e-4, f"blocks {span} with {adapter}")

    await asyncio.gather(*(one(number, *work) for number, work in enumerate(WORK)))


async def test_sessions_of_several_adapters_at_once(adapted: Adapted) -> None:
    with adapted.loaded() as model:
        async with serving(model) as engine:
            await run(engine, adapted)


async def test_beside_captured_steps(adapted: Adapted) -> None:
    """What is captured brings its own rotary angles; adapters' blocks need those of the batch."""
    with adapted.loaded() as model:
        async with kernel_rig.serving(model, NullObserver(), LaunchedGraphs()) as engine:
            await run(engine, adapted)


async def test_passes(adapted: Adapted) -> None:
    """Outputs, and gradients of what entered."""
    span, hidden, grad = BlockSpan(1, 4), states(2, 5), states(2, 5, seed=1)
    with adapted.loaded() as model:
        async with serving(model) as engine:
            for adapter in (None, *ADAPTERS):
                inputs = hidden.clone().requires_grad_()
                expected = adapted.models[adapter].expected(inputs, span)
                expected.backward(grad)
                assert inputs.grad is not None
                output = await engine.forward(PassRequest(span, hidden, "peer", adapter=adapter))
                request = PassRequest(span, hidden, "peer", grad_output=grad, adapter=adapter)
                assert_close(output, expected.detach(), 1e-4, 1e-4, f"output with {adapter}")
                gradient, _ = await engine.backward(request)
                assert_close(gradient, inputs.grad, 1e-4, 1e-4, f"gradient with {adapter}")


async def test_an_adapter_that_is_not_here(adapted: Adapted) -> None:
    """It is named with those that are; nothing else is lost by it."""
    span, hidden = BlockSpan(0, 4), states(1, 2)
    with adapted.loaded() as model:
        async with serving(model) as engine, opened(engine, span, "left") as session:
            await session.step(Step(hidden, 0))
            with pytest.raises(NotServed, match="active_adapter = 'up': the adapters here are left, right"):
                await engine.open_session(SessionSpec(span, 1, 64, "peer", adapter="up"))
            with pytest.raises(NotServed, match="active_adapter"):
                await engine.forward(PassRequest(span, hidden, "peer", adapter="up"))
            await session.step(Step(hidden, 2))
    async with serving(adapted.base) as engine:
        with pytest.raises(NotServed, match="this server has no adapters"):
            await engine.open_session(SessionSpec(span, 1, 64, "peer", adapter="left"))
