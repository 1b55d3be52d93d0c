"""Which errors of torch mean that the device is lost to this process: CUDA answers every later call with them.

The numbers and names are those of ``cudaError_t`` (driver_types.h), whose comments say of these that the process
must be terminated and started again; the texts are what ``cudaGetErrorString`` makes of them, which Triton and
cuBLAS pass on without the number, and ROCm uses too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from petalsd.errors import DeviceLost

# Number -> name and text. Everything else (out of memory, a bad argument, a kernel that needs too many resources)
# concerns one call alone.
_LOST = {
    46: ("DevicesUnavailable", "CUDA-capable device(s) is/are busy or unavailable"),
    100: ("NoDevice", "no CUDA-capable device is detected"),
    214: ("ECCUncorrectable", "uncorrectable ECC error encountered"),
    220: ("NvlinkUncorrectable", "uncorrectable NVLink error detected during the execution"),
    226: ("Contained", "Invalid access of peer GPU memory over nvlink or a hardware error"),
    700: ("IllegalAddress", "an illegal memory access was encountered"),
    702: ("LaunchTimeout", "the launch timed out and was terminated"),
    709: ("ContextIsDestroyed", "context is destroyed"),
    710: ("Assert", "device-side assert triggered"),
    714: ("HardwareStackError", "hardware stack error"),
    715: ("IllegalInstruction", "an illegal instruction was encountered"),
    716: ("MisalignedAddress", "misaligned address"),
    717: ("InvalidAddressSpace", "operation not supported on global/shared address space"),
    718: ("InvalidPc", "invalid program counter"),
    719: ("LaunchFailure", "unspecified launch failure"),
    721: ("TensorMemoryLeak", "tensor memory not completely freed"),
    806: ("MpsRpcFailure", "MPS server communication failure"),
    810: ("MpsClientTerminated", "the MPS client has been terminated"),
    911: ("ExternalDevice", "an async error has occurred in external entity outside of CUDA"),
    999: ("Unknown", "unknown error"),
}
# Only where one of these says that a device speaks: "unknown error" means nothing by itself.
_SPEAKERS = re.compile(r"\b(?:CUDA|HIP|cuda[A-Z]\w+|hip[A-Z]\w+|CUDA_ERROR_\w+)\b")


def device_loss(error: BaseException | None) -> DeviceLost | None:
    """What ``error``, or one that it was raised from, says of a lost device; None if it says nothing of one."""
    for one in _chain(error):
        if isinstance(one, DeviceLost):
            return one
        number = _number(one)
        if number is not None:
            name, text = _LOST[number]
            return DeviceLost(f"cudaError{name}", number, text)
    return None


def raise_if_lost(error: Exception) -> None:
    """Raise DeviceLost from an error of the device that every later call would end with; it passes itself."""
    loss = device_loss(error)
    if loss is not None and loss is not error:
        raise loss from error


def _number(error: BaseException) -> int | None:
    """That of a lost device, from ``torch.AcceleratorError`` or from the text."""
    if not isinstance(error, RuntimeError):
        return None
    number = getattr(error, "error_code", None)
    if isinstance(number, int):
        return number if number in _LOST else None
    # torch appends advice, which names other errors.
    first_line = str(error).partition("\n")[0]
    if not _SPEAKERS.search(first_line):
        return None
    return next((number for number, (_, text) in _LOST.items() if text.lower() in first_line.lower()), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and those it was raised from, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
