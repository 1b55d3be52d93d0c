"""Builds the C++ extension petalsd._C; everything else is declared in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("PETALSD_BUILD_JOBS").install()  # unset: as many as there are cores

setup(
    ext_modules=[
        Pybind11Extension(
            "petalsd._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.hpp") + glob("csrc/*.inc")),
            cxx_std=17,
            # Kernels fuse multiply and add; -Wno-psabi: vectors of 32 bytes never cross a call.
            extra_compile_args=[
                "-O3",
                "-Wall",
                "-Wextra",
                "-fvisibility=hidden",
                "-ffp-contract=fast",
                "-Wno-psabi",
            ],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
