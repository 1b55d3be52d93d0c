"""Imports without searches for garbage."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest

from petalsd.imports import heavy_imports


@pytest.fixture(autouse=True)
def nothing_stays_frozen() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_searched_while_importing_nor_what_was_imported_later() -> None:
    before = gc.get_freeze_count()
    with heavy_imports():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)


def test_a_failed_import_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), heavy_imports():
        raise ImportError("no torch")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with heavy_imports():
        pass
    assert not gc.isenabled()


@pytest.fixture
def usual_interrupts() -> Iterator[None]:
    """Whatever started the tests, or ran before, may have left others: a job in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


@pytest.mark.usefixtures("usual_interrupts")
@pytest.mark.parametrize("is_told", [True, False])
def test_an_interrupt_stays_one(is_told: bool) -> None:
    """What is imported may fail otherwise for it, or go on without what failed; later ones are as before."""
    with pytest.raises(KeyboardInterrupt), heavy_imports():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            if is_told:
                raise ImportError("numpy.core.multiarray failed to import") from None
    assert gc.isenabled()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
