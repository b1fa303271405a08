"""The experts of one MoE layer in one file: valid safetensors whose slabs begin at a page.

Tensors of the file: `slabs` U8 [E, slab_bytes] and, behind them, `crc32` U32 [E], the checksum of every slab. With the
checksums last, a file is written and hashed in one pass.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from expertshare.errors import CheckpointError, ConfigError
from expertshare.experts.slab import PAGE_BYTES, SlabFormat

VERSIONS = {"none": 1, "int8": 2, "int4": 2}
"""Of a layer file, by its scheme. In version 1 quantised experts lay row by row; since 2 they lie in panels."""
_MAX_HEADER_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerHeader:
    """What a layer file says of itself: its MoE layer (0-based among MoE layers), its experts, their format."""

    moe_layer: int
    num_experts: int
    format: SlabFormat

    @property
    def slabs_bytes(self) -> int:
        """Bytes of all experts' slabs together."""
        return self.num_experts * self.format.slab_bytes

    def to_bytes(self) -> bytes:
        """The head of the file up to the first slab: padded with spaces to whole pages, as safetensors allows."""
        data = self.slabs_bytes
        tensors = {
            "__metadata__": {
                "format": "pt",
                "expertshare_experts": str(VERSIONS[self.format.scheme]),
                "moe_layer": str(self.moe_layer),
                "slab": json.dumps(self.format.to_json()),
            },
            "slabs": {"dtype": "U8", "shape": [self.num_experts, self.format.slab_bytes], "data_offsets": [0, data]},
            "crc32": {"dtype": "U32", "shape": [self.num_experts], "data_offsets": [data, data + 4 * self.num_experts]},
        }
        text = json.dumps(tensors).encode()
        padded = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES - 8
        return padded.to_bytes(8, "little") + text.ljust(padded)


class LayerWriter:
    """Writes a layer file as a stream: `append` every slab in order, inside a `with`.

    The file has its name only when it is whole and on the disk: until then it is NAME.partial, which is removed on an
    error, a full disk or an interrupt. After the `with`, num_bytes and sha256 are those of the file.
    """

    def __init__(self, path: Path, header: LayerHeader) -> None:
        self.path = path
        self.num_bytes = 0
        self.sha256 = ""
        self._partial = path.with_name(path.name + ".partial")
        self._header = header
        self._hash = hashlib.sha256()
        self._checksums: list[int] = []

    def __enter__(self) -> Self:
        try:
            self._file = open(self._partial, "wb")
        except OSError as error:
            raise _unwritten(self.path, error) from error
        try:
            self._put(self._header.to_bytes())
        except BaseException:
            self._discard()
            raise
        return self

    def append(self, slab_B: Tensor) -> None:
        """Add the next expert: uint8 [slab_bytes]. Raises CheckpointError where the disk does not take it."""
        expected = self._header.format.slab_bytes
        if slab_B.dtype != torch.uint8 or slab_B.shape != (expected,):
            raise CheckpointError(f"expected a slab uint8 [{expected}], got {slab_B.dtype} {list(slab_B.shape)}")
        data = slab_B.contiguous().numpy().data
        self._checksums.append(zlib.crc32(data))
        self._put(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._finish()
        except BaseException:
            self._discard()
            raise

    def _finish(self) -> None:
        expected, count = self._header.num_experts, len(self._checksums)
        if count != expected:
            raise CheckpointError(f"{self.path}: expected {expected} slabs, got {count}: append them all")
        self._put(b"".join(checksum.to_bytes(4, "little") for checksum in self._checksums))
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise _unwritten(self.path, error) from error
        self.sha256 = self._hash.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise _unwritten(self.path, error) from error
        self._hash.update(data)
        self.num_bytes += len(data)

    def _discard(self) -> None:
        """Give the space back. Closing may fail on the full disk that was the reason."""
        try:
            self._file.close()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
        finally:
            self._partial.unlink(missing_ok=True)


class LayerFile:
    """A layer file, open for reading. Reads are positioned, so that threads may share it.

    direct: read past the page cache (O_DIRECT); the memory read into must then begin at a page. Raises CheckpointError
    for a file that is missing, truncated, of another version or no layer file, ConfigError where direct cannot be.
    """

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        self.path = path
        self._fd = _open(path, direct=False)
        try:
            self.header, self.data_start = _read_header(self._fd, path)
            if direct:
                buffered, self._fd = self._fd, _open(path, direct=True)
                os.close(buffered)
        except BaseException:
            self.close()
            raise

    def offset(self, expert: int) -> int:
        """Where the slab of an expert begins in the file: a multiple of 4096."""
        return self.data_start + expert * self.header.format.slab_bytes

    def read_into(self, expert: int, memory: memoryview) -> None:
        """Read one slab into writable memory of slab_bytes; the interpreter lock is free meanwhile.

        Raises CheckpointError that names file and expert for a read error or a file that ends early.
        """
        done, start = 0, self.offset(expert)
        while done < len(memory):
            try:
                count = os.preadv(self._fd, [memory[done:]], start + done)
            except OSError as error:
                raise CheckpointError(
                    f"reading expert {expert} of {self.path} failed ({error.strerror}): check the disk, then verify or "
                    "convert the model again"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ends within expert {expert}: expected {len(memory)} bytes at {start}, got {done}; "
                    "the file was truncated, convert the model again"
                )
            done += count

    def checksums(self) -> list[int]:
        """The crc32 that each slab must have."""
        raw = bytearray(4 * self.header.num_experts)
        fd = _open(self.path, direct=False)  # a direct descriptor reads whole pages only
        try:
            count = os.preadv(fd, [raw], self.data_start + self.header.slabs_bytes)
        finally:
            os.close(fd)
        if count != len(raw):
            raise CheckpointError(f"{self.path}: expected {len(raw)} bytes of checksums, got {count}: convert it again")
        return [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]

    def fileno(self) -> int:
        """The open descriptor, for mapping."""
        return self._fd

    def close(self) -> None:
        """Let the file go; twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def verify_layer(path: Path) -> None:
    """Read every slab and compare it with its checksum; CheckpointError names the first expert that differs."""
    with LayerFile(path) as file:
        memory = bytearray(file.header.format.slab_bytes)
        for expert, expected in enumerate(file.checksums()):
            file.read_into(expert, memoryview(memory))
            found = zlib.crc32(memory)
            if found != expected:
                raise CheckpointError(
                    f"{path}: expert {expert} has checksum {found:08x}, expected {expected:08x}: the file is damaged, "
                    "copy or convert it again"
                )


def file_sha256(path: Path) -> str:
    """Hex digest of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Put a rename on the disk: without this it may be lost with the power, though the file was synced."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_header(fd: int, path: Path) -> tuple[LayerHeader, int]:
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path} is truncated or not a safetensors file: copy or convert it again")
    try:
        raw = json.loads(os.pread(fd, length, 8))
    except ValueError as error:
        raise CheckpointError(f"{path} has a damaged header ({error}): copy or convert it again") from error
    header = _parse_header(raw, path)
    start, expected = 8 + length, 8 + length + header.slabs_bytes + 4 * header.num_experts
    if start % PAGE_BYTES or size != expected:
        raise CheckpointError(
            f"{path} is damaged: expected {expected} bytes with slabs from a multiple of {PAGE_BYTES} on, got {size} "
            f"bytes with slabs from {start} on; copy or convert it again"
        )
    return header, start


def _parse_header(raw: Any, path: Path) -> LayerHeader:
    metadata = raw.get("__metadata__", {}) if isinstance(raw, Mapping) else {}
    version = metadata.get("expertshare_experts")
    if version is None:
        raise CheckpointError(f"{path} holds no experts in slabs: expected a file that `expertshare convert` wrote")
    try:
        form = SlabFormat.from_json(json.loads(metadata["slab"]), str(path))
        experts, slab_bytes = raw["slabs"]["shape"]
        header = LayerHeader(moe_layer=int(metadata["moe_layer"]), num_experts=int(experts), format=form)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error!r}): copy or convert it again") from error
    if version != str(VERSIONS[form.scheme]):
        raise CheckpointError(
            f"{path} has version {version} of the expert layout, expected {VERSIONS[form.scheme]} for {form.scheme}: "
            "convert the model again, or use the release of expertshare that wrote it"
        )
    if slab_bytes != form.slab_bytes:
        raise CheckpointError(f"{path}: expected slabs of {form.slab_bytes} bytes, got {slab_bytes}: convert it again")
    return header


def _open(path: Path, *, direct: bool) -> int:
    if direct and not hasattr(os, "O_DIRECT"):
        raise ConfigError(f"{sys.platform} has no direct reads: leave --direct-io out")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    except FileNotFoundError as error:
        raise CheckpointError(f"expected the file {path}, which is not there: convert the model again") from error
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            raise ConfigError(f"the file system of {path} has no direct reads: leave --direct-io out") from error
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}): check its permissions") from error


def _unwritten(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} could not be written ({error.strerror}); nothing of it was kept. Free space or choose another "
        "directory, then run the command again"
    )
