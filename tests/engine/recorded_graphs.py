"""A double of captured graphs for the CPU: what was called is noted with its tensors, and called again.

It shows that a replay reads and writes the captured memory and nothing else, that a step has no results that the
host looks at and no shapes that depend on values, and which kernels are launched with what. It does not show the
order of streams, what an allocator gives out twice, or that a device can capture a kernel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from petalsd.ops.launching import Launch

_NOT_CAPTURABLE = {
    "aten::_local_scalar_dense": "the host reads a value",
    "aten::nonzero": "its shape depends on values",
    "aten::masked_select": "its shape depends on values",
    "aten::_unique2": "its shape depends on values",
    "aten::lift_fresh": "it makes a tensor of the host's data",
}
_WITHOUT_KERNEL = ("view", "slice", "select", "t", "flatten", "empty", "alias", "split", "unbind")
_run = Launch.run

MEMORY_BYTES = 1 << 30


@dataclass(slots=True)
class Call:
    """An operator of torch, and what it returned."""

    operator: Any
    arguments: Sequence[Any]
    options: Mapping[str, Any]
    result: Any

    @property
    def is_kernel(self) -> bool:
        """Whether a GPU would be given something to do."""
        name = self.operator._schema.name.removeprefix("aten::").removeprefix("_unsafe_")
        return name not in _WITHOUT_KERNEL

    def again(self) -> None:
        """Into the same tensors: views and results in place are there already."""
        repeated = self.operator(*self.arguments, **self.options)
        for old, new in zip(tree_flatten(self.result)[0], tree_flatten(repeated)[0], strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)


class Recorder(TorchDispatchMode):
    """Puts every operator on a tape. RuntimeError for what a graph cannot hold."""

    def __init__(self, tape: list[Call | Launch]) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        reason = _NOT_CAPTURABLE.get(func._schema.name)
        if reason is not None:
            raise RuntimeError(f"not capturable: {func._schema.name}: {reason}")
        result = func(*args, **(kwargs or {}))
        self._tape.append(Call(func, args, kwargs or {}, result))
        return result


@contextmanager
def recording() -> Iterator[list[Call | Launch]]:
    """What is called meanwhile, launches of kernels in their place among the operators."""
    tape: list[Call | Launch] = []

    def note(launch: Launch) -> None:
        with _disable_current_modes():  # the interpreter is made of operators itself
            _run(launch)
        tape.append(launch)

    with patch.object(Launch, "run", note), Recorder(tape):
        yield tape


@dataclass(slots=True)
class RecordedGraph:
    tape: Sequence[Call | Launch]

    @property
    def launches(self) -> list[Launch]:
        return [one for one in self.tape if isinstance(one, Launch)]

    @property
    def num_kernels(self) -> int:
        return sum(isinstance(one, Launch) or one.is_kernel for one in self.tape)

    def replay(self) -> None:
        for one in self.tape:
            if isinstance(one, Launch):
                _run(one)
            else:
                one.again()


@dataclass(slots=True, weakref_slot=True)
class Launched:
    """A ``Graph`` that computes anew: the same step in the same memory, without a capture."""

    replay: Callable[[], None]


class LaunchedGraphs:
    """``engine.graphs.GraphBackend`` of those."""

    def warm_up(self, compute: Callable[[], None]) -> None:
        compute()

    def capture(self, compute: Callable[[], None]) -> Launched:
        return Launched(compute)

    def free_bytes(self) -> int:
        return MEMORY_BYTES


class ForgottenGraphs(LaunchedGraphs):
    """Knows what it captured, without keeping it."""

    def __init__(self) -> None:
        self.captured: list[weakref.ref[Launched]] = []

    def capture(self, compute: Callable[[], None]) -> Launched:
        graph = super().capture(compute)
        self.captured.append(weakref.ref(graph))
        return graph

    @property
    def num_alive(self) -> int:
        return sum(graph() is not None for graph in self.captured)


@dataclass(slots=True)
class RecordedGraphs:
    """``engine.graphs.GraphBackend`` of a device on which a noted call takes a byte.

    fail_at  number of the capture that fails, from 0
    """

    fail_at: int | None = None
    memory_bytes: int = MEMORY_BYTES
    graphs: list[RecordedGraph] = field(default_factory=list)

    def warm_up(self, compute: Callable[[], None]) -> None:
        compute()

    def capture(self, compute: Callable[[], None]) -> RecordedGraph:
        if len(self.graphs) == self.fail_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        with recording() as tape:
            compute()
        self.graphs.append(RecordedGraph(tape))
        return self.graphs[-1]

    def free_bytes(self) -> int:
        return self.memory_bytes - sum(len(graph.tape) for graph in self.graphs)
