"""A kernel before it is compiled: Triton says what it would compile, and the hash of that says whether it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import triton_key

from benchmarks.gpu import sass

_READER = hashlib.sha256(Path(sass.__file__).read_bytes()).hexdigest()


class Plan:
    """One kernel for one target.

    digest   of all that its figures follow from: source, signature, constants, options, target, the versions of
             Triton and ptxas, and how the machine code is read
    compile  the compiled kernel
    """

    def __init__(self, key: str, compile_it: Callable[[], Any]) -> None:
        # Triton is as good as its version: the key of its files differs between builds for two versions of Python.
        inputs = triton.__version__, key.removeprefix(triton_key()), _READER
        self.digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:24]
        self.compile = cache(compile_it)


class Planning(triton.AsyncCompileMode):  # type: ignore[misc]  # Triton has no types
    """Inside, a kernel that is started with ``warmup`` gives its ``Plan``, and nothing is compiled."""

    def __init__(self) -> None:
        super().__init__(executor=None)

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> Plan:
        return Plan(key, compile_fn)
