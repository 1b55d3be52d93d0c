"""Importing what is heavy: torch, transformers and hivemind make 420 000 objects, and keep nearly all of them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, ModuleType

from petalsd.deferred_imports import deferred_imports


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Import within this block, and what there is at its end is never searched for garbage.

    To search again and again while it grows takes a quarter of the time, and once more at the end of a short
    command. In a daemon each search would stop the loop and the engine for tenths of a second, in the middle of
    somebody's steps.

    What nothing here needs of the libraries stays out (``deferred_imports``). KeyboardInterrupt for an interrupt
    meanwhile, whatever the modules made of it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with _interrupts_kept(), deferred_imports():
            yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def import_heavy(name: str) -> ModuleType:
    """The module ``name``; the first time it is imported as in ``heavy_imports``."""
    if name not in sys.modules:
        with heavy_imports():
            importlib.import_module(name)
    return importlib.import_module(name)


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """The import of a module of C can make an ImportError of an interrupt, and many imports may fail unnoticed."""
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupts:
            raise KeyboardInterrupt
