"""Builds the expert kernel for the CPU; everything else is in pyproject.toml.

A plain shared library for ctypes: no Python, torch or numpy headers, so one build serves every Python. Without a C++
compiler the installation goes on and says so in one line; expertshare then computes experts with torch.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/expertshare/native/csrc")
LOADING = NATIVE.parent / "loading.py"
ABI_VERSION = re.findall(r"^ABI_VERSION = (\d+)", LOADING.read_text(), re.MULTILINE)[0]
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", f"-DEXPERTSHARE_ABI_VERSION={ABI_VERSION}"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# Only these files may use more than the processor's baseline; which of them runs is decided at run time.
# Quantised kernels give the same bits with every instruction set: they fuse where they say so and nowhere else.
AS_WRITTEN = ["-mf16c", "-ffp-contract=off"]
X86_FLAGS = {
    "avx2.cpp": AVX2,
    "avx512.cpp": AVX512,
    "avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "quantised_avx2.cpp": [*AVX2, *AS_WRITTEN],
    "quantised_avx_vnni.cpp": [*AVX2, *AS_WRITTEN, "-mavxvnni"],
    "quantised_avx512_vnni.cpp": [*AVX512, *AS_WRITTEN, "-mavx512vnni"],
    "affinity_avx2.cpp": AVX2,
    "affinity_avx512.cpp": AVX512,
    "affinity_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "norm_avx2.cpp": AVX2,
    "norm_avx512.cpp": AVX512,
}
# Every product is rounded before it is added, as torch does it.
EXACT_FLAGS = {f"norm_{name}.cpp": ["-ffp-contract=off"] for name in ("portable", "avx2", "avx512")}


class CannotBuild(Exception):
    """Why there will be no library."""


def compiler() -> list[str]:
    """The command of the C++ compiler: CXX, or the first of g++, clang++ and c++ that is there."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise CannotBuild("no C++ compiler found (set CXX, or install g++ or clang++)")


def call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotBuild(f"{command[0]} could not be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise CannotBuild(f"{command[0]} failed: {lines[0] if lines else f'exit status {done.returncode}'}")


def compile_source(source: Path, to: Path, cxx: list[str]) -> None:
    """One object file; a compiler that does not know an instruction set yields a file without it."""
    flags = [*FLAGS, *EXACT_FLAGS.get(source.name, []), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    command = [*cxx, *flags, "-c", str(source), "-o", str(to)]
    wide = X86_FLAGS.get(source.name, []) if platform.machine() in ("x86_64", "AMD64") else []
    try:
        call([*command, *wide])
    except CannotBuild as reason:
        if not wide:
            raise
        print(f"expertshare: built without {source.stem}: {reason}")
        call(command)


class BuildKernel(build_ext):
    """Compiles `ext.sources` into one library that setuptools then ships beside native/loading.py."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp) / "expertshare-native"
        try:
            cxx = compiler()
            objects.mkdir(parents=True, exist_ok=True)
            library.parent.mkdir(parents=True, exist_ok=True)
            made = [objects / f"{Path(source).stem}.o" for source in ext.sources]
            for source, to in zip(ext.sources, made, strict=True):
                compile_source(Path(source), to, cxx)
            fresh = library.with_suffix(".new")
            flags = shlex.split(os.environ.get("LDFLAGS", ""))
            call([*cxx, "-shared", "-pthread", *map(str, made), *flags, "-o", str(fresh)])
            fresh.replace(library)  # a process that has the old one mapped keeps it whole
        except CannotBuild as reason:
            library.unlink(missing_ok=True)
            print(f"expertshare: CPU expert kernel not built, torch will be used instead: {reason}")


class AnyPythonWheel(bdist_wheel):
    """The library depends on the platform but on no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "expertshare.native.libexpertshare_cpu",
            sources=[str(path) for path in sorted(NATIVE.glob("*.cpp"))],
            depends=[str(path) for path in (*sorted(NATIVE.glob("*.h")), LOADING)],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": AnyPythonWheel},
)
