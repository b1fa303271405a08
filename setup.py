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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/expertshare/native/csrc")
ABSENT = NATIVE / "absent.cpp"
LOADING = NATIVE.parent / "loading.py"
ABI_VERSION = re.findall(r"^ABI_VERSION = (\d+)", LOADING.read_text(), re.MULTILINE)[0]
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", f"-DEXPERTSHARE_ABI_VERSION={ABI_VERSION}"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISAS = {
    "portable": [],
    "avx2": AVX2,
    "avx_vnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}
# Quantised kernels give the same bits with every instruction set: they fuse where they say so and nowhere else. Norms
# round every product before it is added, as torch does.
AS_WRITTEN = ["-ffp-contract=off"]
# Compiled once for each instruction set, with its flags and those of the source. Only these may use more than the
# processor's baseline; which of them runs is decided at run time.
FAMILIES = {
    "kernels_float32.cpp": (["portable", "avx2", "avx512"], []),
    "kernels_bfloat16.cpp": (["portable", "avx2", "avx512", "avx512_bf16"], []),
    "kernels_quantised.cpp": (["portable", "avx2", "avx_vnni", "avx512_vnni"], AS_WRITTEN),
    "kernels_router.cpp": (["portable", "avx2", "avx512", "avx512_bf16"], []),
    "kernels_norm.cpp": (["portable", "avx2", "avx512"], AS_WRITTEN),
}


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


@dataclass(frozen=True)
class Unit:
    """What becomes one object: a source, for one instruction set where it is of a family."""

    source: Path
    isa: str = ""

    @property
    def name(self) -> str:
        return f"{self.source.stem}_{self.isa}" if self.isa else self.source.stem

    def compile(self, to: Path, cxx: list[str]) -> str | None:
        """Write the object; a compiler that does not know the instruction set yields one without it: returns why."""
        command = [*cxx, *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), "-o", str(to), "-c"]
        if not self.isa:
            return call([*command, str(self.source)])
        absent = [*command, f"-DEXPERTSHARE_ABSENT={self.name.removeprefix('kernels_')}", str(ABSENT)]
        wide = ISAS[self.isa]
        if wide and platform.machine() not in ("x86_64", "AMD64"):
            return call(absent)
        command += [*FAMILIES[self.source.name][1], f"-DEXPERTSHARE_ISA={self.isa}"]
        try:
            return call([*command, *wide, str(self.source)])
        except CannotBuild as reason:
            if not wide:
                raise
            call(absent)
            return f"expertshare: built without {self.name}: {reason}"


def units(sources: list[str]) -> list[Unit]:
    """Every object that these sources make, those that take longest first."""
    paths = [Path(source) for source in sources]
    plain = [Unit(path) for path in paths if path.name not in FAMILIES and path != ABSENT]
    return [Unit(path, isa) for path in paths if path.name in FAMILIES for isa in FAMILIES[path.name][0]] + plain


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
            made = {objects / f"{unit.name}.o": unit for unit in units(ext.sources)}
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                notes = list(threads.map(lambda to: made[to].compile(to, cxx), made))
            for note in filter(None, notes):
                print(note)
            fresh = library.with_suffix(".new")
            flags = shlex.split(os.environ.get("LDFLAGS", ""))
            call([*cxx, "-shared", "-pthread", *map(str, sorted(made)), *flags, "-o", str(fresh)])
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
