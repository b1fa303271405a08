"""Finding and loading `libexpertshare_cpu.so`.

It is built when the package is installed (setup.py) and looked for beside this file, nowhere else. EXPERTSHARE_ISA
names the instruction set to use (avx512_bf16, avx512_vnni, avx512, avx_vnni, avx2, portable) instead of the best that
the processor has; it is read at every call. calls.py says what its functions take.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_int
from functools import cache
from pathlib import Path

from expertshare.errors import ConfigError, nearest

LIBRARY = Path(__file__).with_name("libexpertshare_cpu.so")
ABI_VERSION = 9  # of the structures that cross: raise it when one changes. setup.py builds it into the library


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return (
            f"{LIBRARY.name} is not beside {Path(__file__).name}: there was no C++ compiler when expertshare was "
            f"installed, or it failed. Install g++ or clang++, then expertshare again (pip install -v says why)"
        )
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        version = int(loaded.es_abi_version())
    except (OSError, AttributeError) as error:
        return f"{LIBRARY.name} cannot be loaded: {error}. Install expertshare again"
    if version != ABI_VERSION:
        return f"{LIBRARY.name} is of version {version}, expected {ABI_VERSION}. Install expertshare again"
    loaded.es_isa_name.restype = c_char_p
    loaded.es_isa_name.argtypes = loaded.es_isa_usable.argtypes = [c_int]
    return loaded


def library() -> ctypes.CDLL:
    """The loaded library. Raises ConfigError where there is none."""
    loaded = _load()
    if isinstance(loaded, str):
        raise ConfigError(f"the expert backend 'cpu' is not available: {loaded}, or use the backend 'torch'.")
    return loaded


def available() -> bool:
    """Whether the library is there and fits."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why `available()` is False, with what to do; None where it is True."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@cache
def _isas() -> dict[str, int]:
    """Every instruction set that the library knows -> its number, the fastest first."""
    loaded = library()
    return {loaded.es_isa_name(isa).decode(): isa for isa in range(loaded.es_num_isas())}


def usable_instruction_sets() -> list[str]:
    """Those that this build contains and this processor runs, the fastest first."""
    loaded = library()
    return [name for name, isa in _isas().items() if loaded.es_isa_usable(isa)]


@cache
def _usable_isa(asked: str | None) -> str:
    usable = usable_instruction_sets()
    if asked is None:
        return usable[0]
    if asked not in _isas():
        raise ConfigError(f"EXPERTSHARE_ISA={asked!r} is no instruction set. {nearest(asked, _isas())}")
    if asked not in usable:
        raise ConfigError(
            f"EXPERTSHARE_ISA={asked} cannot run here: the processor or the compiler of this build lacks it. "
            f"Expected one of {', '.join(usable)}; unset it to use the best."
        )
    return asked


def instruction_set() -> str:
    """The instruction set that the next call uses. Raises ConfigError if EXPERTSHARE_ISA names none that runs here."""
    return _usable_isa(os.environ.get("EXPERTSHARE_ISA") or None)


def isa_number() -> int:
    """`instruction_set()` as the library numbers it."""
    return _isas()[instruction_set()]
