"""What petalsd needs of a machine: Python, torch, a GPU that torch sees, a compiler, a clock that is right."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from petalsd.cli.petalsctl.findings import Check, Finding
from petalsd.cli.petalsctl.gpu_checks import NVIDIA_DRIVER, gpu_checks
from petalsd.cli.petalsctl.units import count, size
from petalsd.imports import heavy_imports

_MIN_PYTHON = (3, 11)
_MIN_OPEN_FILES = 4096
_NVIDIA_DEVICE = Path("/dev/nvidiactl")
_CLOCK_UNSYNCHRONIZED = 0x0040  # STA_UNSYNC of <linux/timex.h>
_STATUS_OFFSET = 40  # of `status` in struct timex on 64-bit Linux
_TIMEX_BYTES = 208


def machine_checks() -> list[tuple[str, Check]]:
    return [
        ("Python", check_python),
        ("torch", check_torch),
        ("libraries", check_libraries),
        ("extension", check_extension),
        ("GPU driver", check_driver),
        ("CUDA", check_cuda),
        *gpu_checks(),
        ("Triton", check_triton),
        ("p2pd", check_p2pd),
        ("open files", check_open_files),
        ("clock", check_clock),
    ]


def check_python() -> Finding:
    text = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info < _MIN_PYTHON:
        wanted = ".".join(map(str, _MIN_PYTHON))
        return Finding("Python", "fail", text, f"petalsd needs Python {wanted} or newer")
    return Finding("Python", "ok", text)


def check_torch() -> Finding:
    try:
        with heavy_imports():
            import torch
    except (ImportError, OSError) as error:
        return Finding(
            "torch", "fail", f"cannot be imported: {error}", "reinstall petalsd, or pip install torch"
        )
    built_for = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    threads = torch.get_num_threads()
    return _versioned(
        "torch", torch.__version__, f"{torch.__version__}, built {built_for}, {threads} threads"
    )


def check_libraries() -> Iterator[Finding]:
    """Those that petalsd works with closely; the others come with them."""
    for name in ("transformers", "hivemind"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "fail", "is not installed", "reinstall petalsd")
        else:
            yield _versioned(name, version, version)


def check_extension() -> Finding:
    try:
        from petalsd import _C  # noqa: F401
    except ImportError as error:
        return Finding("extension", "fail", f"cannot be loaded: {error}", "build it again: make install")
    return Finding("extension", "ok", "the C++ part loads")


def check_driver() -> Finding:
    """The kernel's side of CUDA: module loaded, device files there and allowed."""
    if not NVIDIA_DRIVER.exists():
        if _has_nvidia_card():
            fix = "install the driver: apt install nvidia-driver, or your distribution's package"
            return Finding("GPU driver", "warn", "there is an NVIDIA card, but no driver is loaded", fix)
        return Finding("GPU driver", "ok", "no NVIDIA card: blocks are served from the CPU")
    found = re.search(r"(\d+\.\d+(?:\.\d+)?)", NVIDIA_DRIVER.read_text())
    version = f"NVIDIA {found[1]}" if found else "NVIDIA"
    if not os.access(_NVIDIA_DEVICE, os.R_OK | os.W_OK):
        fix = f"check the permissions of {_NVIDIA_DEVICE}; run nvidia-modprobe as root if it is missing"
        return Finding("GPU driver", "fail", f"{version}, but {_NVIDIA_DEVICE} cannot be opened", fix)
    return Finding("GPU driver", "ok", version)


def check_cuda() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield _no_cuda(torch)
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"cuda:{index} {card.name}, {size(free)} of {size(total)} free, compute {card.major}.{card.minor}"
        )
        yield Finding("CUDA", "ok", text)


def check_triton() -> Finding:
    """Triton compiles a small C file at its first use, so a GPU needs a C compiler at run time."""
    import torch

    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        needed = torch.cuda.is_available()
        fix = "pip install triton" if needed else ""
        return Finding("Triton", "fail" if needed else "ok", "is not installed; only GPUs need it", fix)
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None and torch.cuda.is_available():
        return Finding(
            "Triton", "fail", f"{version}, but there is no C compiler", "apt install gcc libc6-dev"
        )
    return _versioned("triton", version, version, shown="Triton")


def check_p2pd() -> Finding:
    """The libp2p daemon that comes with hivemind."""
    spec = importlib.util.find_spec("hivemind")
    if spec is None or spec.origin is None:
        return Finding("p2pd", "fail", "hivemind is not installed", "reinstall petalsd")
    binary = Path(spec.origin).parent / "hivemind_cli" / "p2pd"
    if not binary.is_file():
        fix = "pip install --force-reinstall hivemind"
        return Finding("p2pd", "fail", f"{binary} is missing", fix)
    if not os.access(binary, os.X_OK):
        return Finding("p2pd", "fail", f"{binary} may not be executed", f"chmod +x {binary}")
    return Finding("p2pd", "ok", str(binary))


def check_open_files() -> Finding:
    """The daemon raises its soft limit itself: only the hard one counts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return Finding("open files", "ok", "no limit")
    if hard < _MIN_OPEN_FILES:
        fix = f"LimitNOFILE={_MIN_OPEN_FILES} in the unit, or ulimit -Hn"
        return Finding("open files", "warn", f"at most {count(hard)}; each peer takes a few", fix)
    return Finding("open files", "ok", f"at most {count(hard)}")


def check_clock() -> Finding:
    """Records of the swarm expire by the clock: one that is minutes wrong makes a server invisible."""
    status = _kernel_clock_status()
    if status is None:
        return Finding("clock", "warn", "cannot be asked here", "compare it yourself: date -u")
    if status & _CLOCK_UNSYNCHRONIZED:
        fix = "sudo timedatectl set-ntp true (in a container: on its host)"
        return Finding("clock", "warn", "the kernel does not know it to be synchronized", fix)
    return Finding("clock", "ok", "synchronized")


def _kernel_clock_status() -> int | None:
    """``status`` of adjtimex(2), asked without changing anything."""
    if sys.maxsize <= 1 << 32:
        return None
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    if ctypes.CDLL(None, use_errno=True).adjtimex(timex) < 0:
        return None
    return int.from_bytes(timex.raw[_STATUS_OFFSET : _STATUS_OFFSET + 4], sys.byteorder)


def _no_cuda(torch: Any) -> Finding:
    if not NVIDIA_DRIVER.exists():
        return Finding("CUDA", "ok", "not used")
    if torch.version.cuda is None:
        fix = "install a torch built for CUDA, see docs/install.md"
        return Finding("CUDA", "warn", "there is a driver, but this torch was built for CPUs", fix)
    fix = f"nvidia-smi shows what the driver sees; it must support CUDA {torch.version.cuda}"
    return Finding("CUDA", "fail", "torch sees no device although there is a driver", fix)


def _has_nvidia_card() -> bool:
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        try:
            is_display = (vendor.parent / "class").read_text().startswith("0x03")
            if is_display and vendor.read_text().strip() == "0x10de":
                return True
        except OSError:
            continue
    return False


def _versioned(package: str, version: str, text: str, *, shown: str = "") -> Finding:
    """Compared with what petalsd's own package asks for."""
    wanted = _wanted_version(package)
    name = shown or package
    if wanted and _numbers(version) < _numbers(wanted):
        return Finding(name, "fail", f"{text}, too old", f"pip install '{package}>={wanted}'")
    return Finding(name, "ok", text)


def _wanted_version(package: str) -> str:
    """The lower bound among petalsd's requirements, empty if there is none."""
    try:
        requirements = importlib.metadata.requires("petalsd") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    for requirement in requirements:
        if found := re.match(rf"{package}\s*>=\s*([\d.]+)\s*$", requirement):
            return found[1]
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """2.11.0+cpu -> (2, 11, 0)."""
    release = re.match(r"[\d.]*\d", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()
