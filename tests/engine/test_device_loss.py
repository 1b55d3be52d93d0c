"""A device that is lost: told from errors that concern one call, noticed on the engine thread, and final."""

from __future__ import annotations

import asyncio

import pytest
import torch

from petalsd.device_faults import device_loss
from petalsd.engine.kv_transfer import Place
from petalsd.engine.step import PassRequest, Step
from petalsd.errors import DeviceLost, EngineError, SessionClosed
from petalsd.ops.head_major import HeadMajorKV
from petalsd.types import BlockSpan
from tests.engine.rig import Gate, TinyModel, opened, serving, states, with_hook

ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might "
    "be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)


def accelerator_error(text: str, number: int | None = None) -> torch.AcceleratorError:
    """As torch raises it; builds for CUDA add the number."""
    error = torch.AcceleratorError(text)
    if number is not None:
        error.error_code = number  # type: ignore[attr-defined]
    return error


LOST = {
    "by number": (accelerator_error(f"CUDA error: anything{ADVICE}", 714), 714),
    "illegal access": (
        accelerator_error(f"CUDA error: an illegal memory access was encountered{ADVICE}"),
        700,
    ),
    "ECC": (accelerator_error(f"CUDA error: uncorrectable ECC error encountered{ADVICE}"), 214),
    "fallen off the bus": (accelerator_error(f"CUDA error: unknown error{ADVICE}"), 999),
    "Triton": (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), 719),
    "ROCm": (RuntimeError("HIP error: misaligned address"), 716),
    "driver API": (
        RuntimeError("CUDA_ERROR_ILLEGAL_INSTRUCTION: an illegal instruction was encountered"),
        715,
    ),
}
FORGIVEN = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "a bad argument": accelerator_error(f"CUDA error: invalid argument{ADVICE}", 1),
    "too many resources": accelerator_error(
        f"CUDA error: too many resources requested for launch{ADVICE}", 701
    ),
    "a capture": accelerator_error("CUDA error: operation not permitted when stream is capturing", 900),
    "not of a device": RuntimeError("unknown error"),
    "of another kind": ValueError("CUDA error: an illegal memory access was encountered"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_loses_the_device(name: str) -> None:
    """Known by torch's number or by the driver's text, also where another error was raised from it."""
    error, number = LOST[name]
    loss = device_loss(error)
    assert loss is not None
    assert loss.number == number
    assert f"({number})" in str(loss)
    outer = KeyError("outside")
    outer.__cause__ = error
    wrapped = device_loss(outer)
    assert wrapped is not None
    assert wrapped.number == number


@pytest.mark.parametrize("name", FORGIVEN)
def test_what_concerns_one_call(name: str) -> None:
    """These sessions fail and the device goes on; advice that torch appends names no error."""
    assert device_loss(FORGIVEN[name]) is None


def lose(hidden: torch.Tensor) -> None:
    raise LOST["illegal access"][0]


async def test_a_batch_that_loses_the_device_ends_everything(llama: TinyModel) -> None:
    """Not each session is tried alone: all end, later ones are refused, and whoever waits for the loss hears."""
    async with serving(llama, blocks=with_hook(llama, 3, lose)) as engine, opened(engine) as bystander:
        await bystander.step(Step(states(1, 0), 0))
        waiting = asyncio.create_task(engine.until_lost())
        async with opened(engine, BlockSpan(2, 4)) as guilty:
            with pytest.raises(EngineError, match="DeviceLost"):
                await guilty.step(Step(states(1, 2), 0))
        with pytest.raises(DeviceLost, match="cudaErrorIllegalAddress"):
            await waiting
        assert engine.device_loss is not None
        with pytest.raises((EngineError, SessionClosed)):
            await bystander.step(Step(states(1, 1), 0))
        with pytest.raises(EngineError, match="has failed"):
            await engine.probe()


async def test_what_waits_behind_the_batch_that_loses_the_device(llama: TinyModel, gate: Gate) -> None:
    """It came before anybody could know, and nobody will ever compute it: it is told so at once."""

    def lose_later(hidden: torch.Tensor) -> None:
        gate(hidden)
        lose(hidden)

    async with (
        serving(llama, blocks=with_hook(llama, 3, lose_later)) as engine,
        opened(engine, BlockSpan(0, 2)) as bystander,
        opened(engine, BlockSpan(1, 2)) as leaving,
        opened(engine, BlockSpan(2, 4)) as guilty,
    ):
        await leaving.step(Step(states(1, 2), 0))
        work = [asyncio.create_task(guilty.step(Step(states(1, 2), 0)))]
        await gate.wait_until_reached()
        work.append(asyncio.create_task(bystander.step(Step(states(1, 2), 0))))
        work.append(asyncio.create_task(leaving.read_kv(Place(BlockSpan(1, 2), 0, 2))))
        request = PassRequest(BlockSpan(0, 1), states(1, 2), peer="peer")
        work.append(asyncio.create_task(engine.forward(request)))
        await asyncio.sleep(0)  # all of it is handed in
        gate.opened.set()
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(*work, return_exceptions=True)
        assert all(isinstance(outcome, EngineError) for outcome in outcomes), outcomes


async def test_a_pass_that_loses_the_device(llama: TinyModel) -> None:
    """Passes and what is copied between batches are no way around."""
    async with serving(llama, blocks=with_hook(llama, 0, lose)) as engine:
        with pytest.raises(EngineError, match="DeviceLost"):
            await engine.forward(PassRequest(BlockSpan(0, 1), states(1, 2), peer="peer"))
        with pytest.raises(DeviceLost):
            await engine.until_lost()


async def test_a_transfer_that_loses_the_device(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are read from the same device."""
    async with serving(llama) as engine, opened(engine) as session:
        await session.step(Step(states(1, 2), 0))
        monkeypatch.setattr(HeadMajorKV, "gather", lambda kv, slots: lose(slots))
        with pytest.raises(EngineError, match="DeviceLost"):
            await session.read_kv(Place(BlockSpan(0, 1), 0, 2))
        with pytest.raises(DeviceLost):
            await engine.until_lost()


async def test_a_lost_device_between_batches(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies before a batch belong to no session."""
    async with serving(llama) as engine, opened(engine) as session:
        assert engine.pool is not None
        monkeypatch.setattr(engine.pool, "apply_copies", lambda: lose(torch.empty(0)))
        with pytest.raises(EngineError, match="DeviceLost"):
            await session.step(Step(states(1, 2), 0))
        with pytest.raises(DeviceLost):
            await engine.until_lost()
        monkeypatch.undo()
