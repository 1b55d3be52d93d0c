"""The background loop: results and errors cross threads, interrupts cancel, stopping ends everything."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from petalsd.client.runtime import ClientRuntime
from petalsd.errors import SessionClosed, SwarmError


async def answer(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fail() -> None:
    raise SwarmError("no way")


def test_results_and_errors_reach_the_caller() -> None:
    """The caller sees what the coroutine returned or raised."""
    with ClientRuntime() as runtime:
        assert runtime.run(answer(7)) == 7
        with pytest.raises(SwarmError, match="no way"):
            runtime.run(fail())


def test_callers_of_several_threads_share_the_loop() -> None:
    """Two jobs that wait for each other both finish."""
    with ClientRuntime() as runtime:
        there = runtime.run(make_event())
        waiter = threading.Thread(target=lambda: runtime.run(there.wait()))
        waiter.start()
        runtime.run(set_event(there))
        waiter.join(10)
        assert not waiter.is_alive()


async def make_event() -> asyncio.Event:
    return asyncio.Event()


async def set_event(event: asyncio.Event) -> None:
    event.set()


def test_stop_cancels_what_runs() -> None:
    """A caller that waits is told so, and later calls are refused."""
    runtime = ClientRuntime()
    runtime.start()
    started, outcome = threading.Event(), []

    async def wait_for_ever() -> None:
        started.set()
        await asyncio.Event().wait()

    def call() -> None:
        try:
            runtime.run(wait_for_ever())
        except BaseException as error:
            outcome.append(f"{type(error).__name__}: {error}")

    caller = threading.Thread(target=call)
    caller.start()
    started.wait(10)
    runtime.stop()
    caller.join(10)
    assert outcome == ["SessionClosed: session_closed: the client was closed meanwhile"]
    runtime.stop()
    with pytest.raises(SessionClosed):
        runtime.run(answer(1))


def test_the_loop_does_not_wait_for_itself() -> None:
    """Blocking calls from a coroutine of the same loop are refused instead of hanging."""
    with ClientRuntime() as runtime:

        async def nested() -> int:
            return runtime.run(answer(1))

        with pytest.raises(SessionClosed, match="own loop"):
            runtime.run(nested())


def test_stop_lets_what_was_interrupted_end() -> None:
    """And keeps what that needs for it: or else processes that it had begun would be left behind."""
    runtime, begun, tidied = ClientRuntime(), threading.Event(), []
    runtime.start()

    async def tidy() -> None:
        await asyncio.sleep(0.01)
        tidied.append(True)

    async def start() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.create_task(tidy())

    future = asyncio.run_coroutine_threadsafe(start(), runtime._loop)
    begun.wait(10)
    future.cancel()
    runtime.stop()
    assert tidied == [True]


def test_finalizers_do_not_wait() -> None:
    """They may run on the loop's own thread: jobs are started, the last of them before the loop ends."""
    runtime, done = ClientRuntime(), threading.Event()
    runtime.start()

    async def last() -> None:
        done.set()

    async def finalize() -> None:
        runtime.start_soon(fail)
        runtime.stop_soon(last)

    runtime.run(finalize())
    assert done.wait(10)
    runtime._thread.join(10)
    assert not runtime._thread.is_alive() and not runtime.is_running
    runtime.start_soon(last)
    runtime.stop_soon(last)


def test_a_forked_process_has_no_loop() -> None:
    """Its threads stayed behind: a call says so instead of waiting, and nothing there ends the parent's."""
    with ClientRuntime() as runtime:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            try:
                runtime.run(answer(1))
            except SessionClosed as error:
                os.write(writer, str(error).encode())
            runtime.stop_soon(fail)
            runtime.stop()
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            assert "make one here" in pipe.read()
        assert os.waitpid(child, 0)[1] == 0
        assert runtime.run(answer(7)) == 7


def test_clients_of_one_process_may_start_processes_at_the_same_time() -> None:
    """Each has a libp2p daemon of its own, and programs make several clients at once."""

    async def start_some() -> list[int]:
        return [await (await asyncio.create_subprocess_exec("true")).wait() for _ in range(8)]

    def use(_: int) -> list[int]:
        with ClientRuntime() as runtime:
            together.wait(10.0)
            return runtime.run(start_some())

    num_clients, together = 4, threading.Barrier(4)
    with ThreadPoolExecutor(num_clients) as pool:
        assert list(pool.map(use, range(num_clients))) == [[0] * 8] * num_clients
