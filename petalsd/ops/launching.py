"""How every kernel is started: the checks of its tensors, the launch itself, and a record of launches for tests.

A kernel that is compiled for whole 16-byte loads and stores reads and writes wrong places with other strides, or
is compiled again without them and spills. So tensors whose rows do not start at multiples of 16 elements are
refused here, before they reach a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from triton.runtime.interpreter import InterpretedFunction

from petalsd.errors import EngineError

ALIGNED_ELEMENTS = 16
_ALIGNED_BYTES = 16

Argument: TypeAlias = torch.Tensor | int | float | None
Constant: TypeAlias = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Options:
    """How a kernel is compiled for a multiprocessor.

    max_registers  of a thread; None: as many as let most programs run side by side, for which the assembler spills
    """

    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def keywords(self) -> dict[str, int | None]:
        """Triton's names for them."""
        return {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of ``kernel``, a function decorated by ``triton.jit``.

    grid       up to three numbers of programs
    arguments  in the kernel's order, before its constants; None where the kernel goes without the tensor
    constants  its ``constexpr`` parameters by name
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Argument, ...]
    constants: Mapping[str, Constant]
    options: Options

    @property
    def device(self) -> torch.device:
        return next(argument.device for argument in self.arguments if isinstance(argument, torch.Tensor))

    def run(self) -> None:
        """EngineError where kernels cannot run."""
        device = self.device
        if isinstance(self.kernel, InterpretedFunction):
            self._refuse_bfloat16()
            self._start()
        elif device.type == "cuda":
            with torch.cuda.device(device):
                self._start()
        else:
            raise EngineError(
                f"{self.kernel.__name__} cannot run on {device}: kernels need a CUDA device",
                hint="tests set TRITON_INTERPRET=1 before the kernels are imported",
            )

    def _refuse_bfloat16(self) -> None:
        """The interpreter computes with the raw bits of bfloat16 values, and nothing would tell."""
        tensors = (argument for argument in self.arguments if isinstance(argument, torch.Tensor))
        if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            raise EngineError(
                f"{self.kernel.__name__}: Triton's interpreter cannot compute with bfloat16",
                hint="use float16 or float32 in tests",
            )

    def _start(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constants, **self.options.keywords)


def takes_ptx(kernel: Any) -> bool:
    """Whether code in PTX may stand in the kernel: it is compiled, for NVIDIA's devices."""
    return not isinstance(kernel, InterpretedFunction) and torch.version.hip is None


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)
_assumed: ContextVar[int] = ContextVar("assumed", default=0)


@contextmanager
def record_launches(capability: int = 0) -> Iterator[list[Launch]]:
    """Notes every launch of this context in the list. Those on tensors of the device "meta" end there.

    capability  what ``capability_of`` says of such a device meanwhile
    """
    launches: list[Launch] = []
    tokens = _recorded.set(launches), _assumed.set(capability)
    try:
        yield launches
    finally:
        _recorded.reset(tokens[0])
        _assumed.reset(tokens[1])


def capability_of(device: torch.device) -> int:
    """The compute capability of an NVIDIA device, times ten: 90 for Hopper. 0 of others, and of the CPU."""
    if device.type == "meta":
        return _assumed.get()
    return _capability(device) if device.type == "cuda" and torch.version.hip is None else 0


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Argument],
    constants: Mapping[str, Constant],
    options: Options,
) -> None:
    """Start a kernel; ``Launch`` has the arguments. Nothing is started for an empty grid.

    EngineError where kernels cannot run.
    """
    if 0 in grid:
        return
    started = Launch(kernel, grid, tuple(arguments), constants, options)
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(started)
    if recorded is None or started.device.type != "meta":
        started.run()


def check_tensor(
    name: str, tensor: torch.Tensor, shape: Sequence[int | None], dtype: torch.dtype | None = None
) -> None:
    """ValueError unless the tensor has this shape (None: any size) and dtype, and strides that kernels can use.

    They can when the last dimension is contiguous, and all others start at multiples of 16 elements, in memory
    that begins at 16 bytes.
    """
    if not _fits(tensor.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}: it must be [{wanted}]")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}: it must be {dtype}")
    if not _is_aligned(tensor):
        raise ValueError(
            f"{name} of shape {list(tensor.shape)} has strides {list(tensor.stride())}: the last must be 1, the "
            f"others multiples of {ALIGNED_ELEMENTS}"
        )
    if tensor.data_ptr() % _ALIGNED_BYTES:
        raise ValueError(f"{name} starts at an address that is no multiple of {_ALIGNED_BYTES} bytes")


def _fits(sizes: torch.Size, shape: Sequence[int | None]) -> bool:
    if len(sizes) != len(shape):
        return False
    return not [1 for size, wanted in zip(sizes, shape, strict=True) if wanted is not None and wanted != size]


def _is_aligned(tensor: torch.Tensor) -> bool:
    sizes = tensor.shape
    if not sizes or (sizes[-1] % ALIGNED_ELEMENTS == 0 and tensor.is_contiguous()):
        return True
    *outer, last = tensor.stride()
    is_contiguous = sizes[-1] == 1 or last == 1
    return is_contiguous and not any(
        stride % ALIGNED_ELEMENTS for size, stride in zip(sizes, outer, strict=False) if size > 1
    )


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of all dimensions but the last, as kernels want them.

    A dimension of one element may have any stride in torch; it gets what it had if it were longer, so that one
    compiled kernel serves all sizes.
    """
    sizes, found = tensor.shape, list(tensor.stride()[:-1])
    for dim in range(len(found) - 1, -1, -1):
        if sizes[dim] == 1:
            found[dim] = sizes[-1] if dim == len(found) - 1 else found[dim + 1] * sizes[dim + 1]
    return tuple(found)


def next_power_of_2(count: int) -> int:
    """The smallest that is not below ``count``: the sizes of a kernel's tiles."""
    return 1 << max(0, count - 1).bit_length()
