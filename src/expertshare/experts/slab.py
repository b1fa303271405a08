"""One expert as bytes: its weights side by side in a slab, so that a single read brings all of them.

The specification is docs/expert-layout.md. Everything about a slab follows from the table of its parts: the offsets,
the writing, and the views through which the kernels compute on the bytes as they lie. Then memory for slabs, and sizes
of memory as people write them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from expertshare.errors import CheckpointError, ConfigError, ExpertMemoryError, InputError
from expertshare.native import ask_for_huge_pages
from expertshare.types import PANEL_ROWS, Bank, ExpertBank, QuantisedBank, QuantisedWeight

PAGE_BYTES = 4096
"""Slabs are whole pages: a mapping can advise the kernel about one expert, and O_DIRECT can read one."""
PART_BYTES = 64
"""Parts begin at a cache line, and at an address that every vector load may use."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_BITS = {"none": 0, "int8": 8, "int4": 4}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix within a slab. name: `projection` or `projection.field`; offset and size in bytes."""

    name: str
    dtype: torch.dtype
    rows: int
    columns: int
    offset: int

    @property
    def num_bytes(self) -> int:
        """Without what follows it up to the next part."""
        return self.rows * self.columns * self.dtype.itemsize

    def of(self, slabs_SB: Tensor) -> Tensor:
        """This matrix of every slab (uint8 [slots, slab_bytes]): [slots, rows, columns], a view."""
        bytes_SB = slabs_SB[:, self.offset : self.offset + self.num_bytes]
        return bytes_SB.view(self.dtype).view(-1, self.rows, self.columns)


@dataclass(frozen=True, kw_only=True)
class SlabFormat:
    """How the bytes of one expert are arranged.

    scheme: "none" keeps floats of `dtype` ("bfloat16" or "float32"); "int8" has one scale a row; "int4" has a scale
    for every `group_size` inputs of a row, and a minimum where `has_minima`. hidden: D, inner: F. The fields that a
    scheme does not use keep their defaults. Raises ConfigError for a combination that cannot be.
    """

    scheme: str
    dtype: str = "bfloat16"
    hidden: int
    inner: int
    group_size: int = 0
    has_minima: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in _BITS:
            raise ConfigError(f"expected a scheme of none, int8 or int4, got {self.scheme!r}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"expected a dtype of bfloat16 or float32, got {self.dtype!r}")
        if min(self.hidden, self.inner) < 1:
            raise ConfigError(f"expected sizes of at least 1, got hidden {self.hidden} and inner {self.inner}")
        if self.scheme != "none" and (self.hidden % PANEL_ROWS or self.inner % PANEL_ROWS):
            raise ConfigError(
                f"quantised experts lie in panels of {PANEL_ROWS} rows and expect multiples of {PANEL_ROWS}, got "
                f"hidden {self.hidden} and inner {self.inner}: leave these experts unquantised"
            )
        if self.scheme != "int4":
            if self.group_size or self.has_minima:
                raise ConfigError(f"groups and minima belong to int4, got them for {self.scheme!r}: leave them out")
            return
        for name, depth in (("hidden", self.hidden), ("inner", self.inner)):
            if self.group_size < 2 or self.group_size % 2 or depth % self.group_size:
                raise ConfigError(
                    f"expected an even group size that divides {name} {depth}, got {self.group_size}: try 32 or 64"
                )

    @property
    def float_dtype(self) -> torch.dtype | None:
        """Of the weights; None where they are codes, which compute with activations of any dtype."""
        return _DTYPES[self.dtype] if self.scheme == "none" else None

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The table: every matrix of a slab, in order."""
        found: list[Part] = []
        for name, dtype, rows, columns in self._matrices():
            start = found[-1].offset + found[-1].num_bytes if found else 0
            found.append(Part(name, dtype, rows, columns, _round_up(start, PART_BYTES)))
        return tuple(found)

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights, without padding."""
        return sum(part.num_bytes for part in self.parts)

    @cached_property
    def slab_bytes(self) -> int:
        """Bytes that one expert takes in a file or a slot."""
        return _round_up(self.parts[-1].offset + self.parts[-1].num_bytes, PAGE_BYTES)

    def write(self, slab_B: Tensor, matrices: Mapping[str, Tensor]) -> None:
        """Fill a slab, what lies between the parts with zeros, so that equal experts give equal bytes.

        Raises CheckpointError unless `matrices` has exactly the parts of the table, each with its shape and dtype.
        """
        names = {part.name for part in self.parts}
        if set(matrices) != names:
            raise CheckpointError(f"expected the parts {sorted(names)} of an expert, got {sorted(matrices)}")
        slab_B.zero_()
        for part in self.parts:
            given = matrices[part.name]
            if given.shape != (part.rows, part.columns) or given.dtype != part.dtype:
                raise CheckpointError(
                    f"expected {part.name} as {part.dtype} [{part.rows}, {part.columns}], "
                    f"got {given.dtype} {list(given.shape)}"
                )
            part.of(slab_B.unsqueeze(0))[0].copy_(given)

    def bank(self, slabs_SB: Tensor) -> Bank:
        """Slabs (uint8 [slots, slab_bytes]) as weights to compute with: views, nothing is copied."""
        views = {part.name: part.of(slabs_SB) for part in self.parts}
        if self.scheme == "none":
            return ExpertBank(views["gate_up"], views["down"])
        gate_up, down = (
            QuantisedWeight(
                views[f"{projection}.codes_EPC"],
                views[f"{projection}.scales_EPG"],
                views.get(f"{projection}.minima_EPG"),
                bits=_BITS[self.scheme],
                group_size=self.group_size or depth,
            )
            for projection, depth in (("gate_up", self.hidden), ("down", self.inner))
        )
        return QuantisedBank(gate_up, down)

    def to_json(self) -> dict[str, Any]:
        """Plain values by the names of the fields."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any], where: str) -> SlabFormat:
        """The format of which `to_json` gave `value`; CheckpointError, which names `where`, for anything else."""
        keys = [field.name for field in fields(SlabFormat)]
        if set(value) != set(keys):
            raise CheckpointError(f"{where}: expected the scheme's keys {', '.join(keys)}, got {', '.join(value)}")
        try:
            return SlabFormat(**value)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{where}: {error}") from error

    def _matrices(self) -> Iterator[tuple[str, torch.dtype, int, int]]:
        """Name, dtype, rows and columns of the parts, in the order in which a kernel needs them. Those of a quantised
        projection are named as the fields of QuantisedWeight."""
        for projection, rows, depth in (("gate_up", 2 * self.inner, self.hidden), ("down", self.hidden, self.inner)):
            panels = rows // PANEL_ROWS
            if self.scheme == "none":
                yield projection, _DTYPES[self.dtype], rows, depth
            elif self.scheme == "int8":
                yield f"{projection}.codes_EPC", torch.int8, panels, depth * PANEL_ROWS
                yield f"{projection}.scales_EPG", torch.float32, panels, PANEL_ROWS
            else:
                yield f"{projection}.codes_EPC", torch.uint8, panels, depth // 2 * PANEL_ROWS
                for name in ("scales_EPG", "minima_EPG")[: 1 + self.has_minima]:
                    yield f"{projection}.{name}", torch.float16, panels, depth // self.group_size * PANEL_ROWS


def _round_up(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def allocate_slabs(count: int, slab_bytes: int) -> Tensor:
    """Uninitialised uint8 [count, slab_bytes]; a page is taken from the system when it is first written.

    Raises ExpertMemoryError where the system refuses that much address space.
    """
    try:
        raw = torch.empty(count * slab_bytes + PAGE_BYTES, dtype=torch.uint8)
    except RuntimeError as error:  # what torch's allocator raises
        raise ExpertMemoryError(
            f"expected memory for {count} experts, got no {format_size(count * slab_bytes)} from the system: lower "
            "--expert-memory, or take mmap"
        ) from error
    slabs_SB = whole_slabs(raw, slab_bytes)
    ask_for_huge_pages(slabs_SB)
    return slabs_SB


def whole_slabs(raw: Tensor, slab_bytes: int) -> Tensor:
    """Of some memory (uint8 [bytes]) all but a page, uint8 [slots, slab_bytes], so that slabs begin at pages."""
    start = -raw.data_ptr() % PAGE_BYTES
    return raw[start : start + len(raw) - PAGE_BYTES].view(-1, slab_bytes)


def as_memory(slabs_SB: Tensor) -> memoryview:
    """The bytes of all slabs in one row, writable."""
    return slabs_SB.flatten().numpy().data


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
