"""Safetensors files read and written one tensor at a time, without mapping them: memory is what a tensor needs."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expertshare.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}
"""The dtypes of weights and codes, by the format's own names."""
MAX_HEADER_BYTES = 100_000_000
"""As the format's own library limits it."""

Pieces = Callable[[str], Iterable[Tensor]]
"""A tensor by name, in pieces along its first dimension."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. dtype: the format's name, such as BF16. start: of its bytes, behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorFile:
    """An open safetensors file. header: its text; entries: its tensors by name."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.header, self._data_start = _read_header(path, descriptor)
        self.entries = self._parse()

    def entry(self, name: str) -> TensorEntry:
        """What the header says of a tensor; CheckpointError if it says nothing."""
        if name not in self.entries:
            raise CheckpointError(f"{self.path} has no tensor {name}: download or convert it again")
        return self.entries[name]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or row `index` of its first dimension, in memory of its own."""
        entry = self.entry(name)
        shape, start = entry.shape, entry.start
        if index is not None:
            shape = shape[1:]
            start += index * math.prod(shape) * DTYPES[entry.dtype].itemsize
        tensor = torch.empty(shape, dtype=DTYPES[entry.dtype])
        self._fill(tensor, self._data_start + start, name)
        return tensor

    def _fill(self, tensor: Tensor, offset: int, name: str) -> None:
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        while view:
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise CheckpointError(
                    f"reading {name} from {self.path} failed ({error.strerror}): check the disk"
                ) from error
            if count == 0:
                raise CheckpointError(f"{self.path} ends within its tensor {name}: it is truncated, download it again")
            view, offset = view[count:], offset + count

    def _parse(self) -> dict[str, TensorEntry]:
        try:
            raw = json.loads(self.header)
            return {
                name: TensorEntry(name, value["dtype"], tuple(value["shape"]), value["data_offsets"][0])
                for name, value in raw.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path} has no safetensors header: download it again") from error


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file. Raises CheckpointError where it cannot be read or is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}): is the checkpoint complete?") from error
    try:
        yield TensorFile(path, descriptor)
    finally:
        os.close(descriptor)


def file_bytes(entries: Iterable[TensorEntry]) -> int:
    """Size of a file of these tensors."""
    ordered = _in_file_order(entries)
    return len(_header(ordered)) + sum(entry.num_bytes for entry in ordered)


def write_tensors(path: Path, entries: Iterable[TensorEntry], pieces: Pieces) -> None:
    """Write a safetensors file in which `pieces(name)` is asked for one tensor after the other, in the file's order.

    Wider dtypes come first, so that every tensor is aligned to its dtype. The pieces of a tensor, in its dtype, are put
    one behind the other: it need not be in memory as a whole.
    """
    ordered = _in_file_order(entries)
    with path.open("wb") as file:
        file.write(_header(ordered))
        for entry in ordered:
            written = 0
            for piece in pieces(entry.name):
                assert piece.dtype == DTYPES[entry.dtype], entry
                written += file.write(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            assert written == entry.num_bytes, entry


def _in_file_order(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    return sorted(entries, key=lambda entry: -DTYPES[entry.dtype].itemsize)


def _header(entries: Iterable[TensorEntry]) -> bytes:
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.num_bytes
        described[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_header(path: Path, descriptor: int) -> tuple[bytes, int]:
    """The header's text and where the data begins."""
    prefix = os.pread(descriptor, 8, 0)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= min(MAX_HEADER_BYTES, os.fstat(descriptor).st_size - 8):
        raise CheckpointError(f"{path} is truncated or not a safetensors file: download it again")
    return os.pread(descriptor, length, 8), 8 + length
