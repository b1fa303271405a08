"""How much memory experts may take, as people write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from expertshare.errors import InputError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Bytes of a size such as 3GiB, 800MB, 1.5 GiB or 4096 (bytes). Raises InputError for anything else, and for 0."""
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise InputError(f"expected a size such as 3GiB, 800MB or a number of bytes, got {text!r}: write it like that")
    size = int(float(match[1]) * unit)
    if size < 1:
        raise InputError(f"expected a size of at least one byte, got {text!r}: give a larger one")
    return size


def format_size(num_bytes: int) -> str:
    """A size in binary units, rounded up to a tenth, so that it can be given back as a budget."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if num_bytes >= u), (1, "B"))
    return f"{-(-num_bytes * 10 // unit) / 10:g}{name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMemory:
    """Where experts are kept. kind "all": in memory, all of them; "mmap": mapped, the kernel decides; "budget": slots
    of num_bytes altogether, filled by explicit reads."""

    kind: Literal["all", "mmap", "budget"]
    num_bytes: int = 0

    @staticmethod
    def parse(text: str) -> ExpertMemory:
        """From `all`, `mmap` or a size; InputError for anything else."""
        if text in ("all", "mmap"):
            return ExpertMemory(kind="all" if text == "all" else "mmap")
        try:
            return ExpertMemory(kind="budget", num_bytes=parse_size(text))
        except InputError as error:
            raise InputError(f"expert memory: {error}, or all, or mmap") from error

    @staticmethod
    def parse_host(text: str) -> ExpertMemory:
        """Memory of the host beside a GPU, from `all` or a size; InputError for anything else."""
        if text == "all":
            return ExpertMemory(kind="all")
        try:
            return ExpertMemory(kind="budget", num_bytes=parse_size(text))
        except InputError as error:
            raise InputError(f"host memory: {error}, or all") from error

    def slabs(self, slab_bytes: int, num_experts: int) -> int:
        """How many of so many experts it holds."""
        return {"all": num_experts, "mmap": 0, "budget": min(self.num_bytes // slab_bytes, num_experts)}[self.kind]

    def __str__(self) -> str:
        return str(self.num_bytes) if self.kind == "budget" else self.kind
