"""The files of a converted model, for reading: a manifest, and one file with the experts of each MoE layer.

A layer file is valid safetensors: `slabs` U8 [E, slab_bytes], which begin at a page, and behind them `crc32` U32 [E],
the checksum of every slab. The specification is docs/expert-layout.md; convert/ writes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import sys
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from expertshare.errors import CheckpointError, ConfigError
from expertshare.experts.slab import PAGE_BYTES, SlabFormat

MANIFEST = "expert_layout.json"
DENSE = "dense.safetensors"
"""All tensors that are no expert's, under their Hugging Face names; shards have DENSE_INDEX beside them."""
DENSE_INDEX = "dense.safetensors.index.json"
EMBEDDINGS = ("none", "int8")
LAYER_PREFIX = "experts-"
_VERSION = 1
_QUANTISED_EMBEDDINGS_VERSION = 3
"""Of a manifest that says how embeddings are stored, which a reader of version 1 would not know. In version 2 their
codes lay row by row, since 3 in panels."""
_LAYER_VERSIONS = {"none": 1, "int8": 2, "int4": 2}
"""Of a layer file, by its scheme. In version 1 quantised experts lay row by row; since 2 they lie in panels."""
_ANEW = "verify or convert the model again"
_MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library limits it."""


def layer_file_name(moe_layer: int) -> str:
    """Name of the file with the experts of a MoE layer (0-based among MoE layers)."""
    return f"{LAYER_PREFIX}{moe_layer:05}.safetensors"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that was written: its name in the directory, size and hex digest."""

    name: str
    num_bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> FileRecord:
        """The record of a file as it is now; reads all of it."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileRecord(path.name, os.fstat(file.fileno()).st_size, digest)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """A converted model. expert_files: one for each MoE layer, in order; dense_files: everything else that has tensors.

    embeddings: how embedding and head are stored, "none" (as they were) or "int8".
    source: what it was made from, free in form, for people and for telling whether a conversion can be resumed.
    """

    format: SlabFormat
    num_experts: int
    expert_files: tuple[FileRecord, ...]
    dense_files: tuple[FileRecord, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    embeddings: str = "none"

    @property
    def num_layers(self) -> int:
        """MoE layers, each of them a file."""
        return len(self.expert_files)

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain values, version first."""
        files = {"expert_files": self.expert_files, "dense_files": self.dense_files}
        return {
            "version": _VERSION if self.embeddings == "none" else _QUANTISED_EMBEDDINGS_VERSION,
            "slab": self.format.to_json(),
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            **{
                key: [{"name": file.name, "bytes": file.num_bytes, "sha256": file.sha256} for file in records]
                for key, records in files.items()
            },
            "source": dict(self.source),
            **({} if self.embeddings == "none" else {"embeddings": self.embeddings}),
        }


def has_expert_layout(directory: Path) -> bool:
    """Whether a finished conversion is there: the manifest is written last."""
    return (directory / MANIFEST).exists()


def read_manifest(directory: Path) -> ExpertLayout:
    """The manifest of a converted model. Raises CheckpointError for one that is missing, damaged or of another version,
    or whose files are missing or of another size; their content is for `convert.verify`."""
    path = directory / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: it is not a converted model, or its conversion did not finish; run "
            "`expertshare convert`"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): copy or convert the model again") from error
    layout = _parse(raw, path)
    for record in (*layout.expert_files, *layout.dense_files):
        file = directory / record.name
        if not file.exists():
            raise CheckpointError(f"{MANIFEST} lists {file}, which is not there: copy or convert the model again")
        if (size := file.stat().st_size) != record.num_bytes:
            raise CheckpointError(
                f"{file} has {size} bytes, expected {record.num_bytes} by {MANIFEST}: it was truncated or replaced, "
                "copy or convert the model again"
            )
    return layout


def _parse(raw: Any, path: Path) -> ExpertLayout:
    version = raw.get("version") if isinstance(raw, dict) else None
    if version not in (_VERSION, _QUANTISED_EMBEDDINGS_VERSION):
        raise CheckpointError(
            f"{path} has version {version} of the expert layout, expected {_VERSION} or "
            f"{_QUANTISED_EMBEDDINGS_VERSION}: convert the model again, or use "
            "the release of expertshare that wrote it"
        )
    try:
        layout = ExpertLayout(
            format=SlabFormat.from_json(raw["slab"], str(path)),
            num_experts=int(raw["num_experts"]),
            expert_files=_records(raw["expert_files"]),
            dense_files=_records(raw["dense_files"]),
            source=dict(raw["source"]),
            embeddings="none" if version == _VERSION else str(raw["embeddings"]),
        )
        if layout.embeddings not in EMBEDDINGS:
            raise ValueError(f"embeddings {layout.embeddings!r} are none of {', '.join(EMBEDDINGS)}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): copy or convert the model again") from error
    if layout.num_layers != raw.get("num_layers"):
        raise CheckpointError(f"{path} lists {layout.num_layers} expert files, expected {raw.get('num_layers')}")
    return layout


def _records(raw: list[dict[str, Any]]) -> tuple[FileRecord, ...]:
    records = tuple(FileRecord(str(r["name"]), int(r["bytes"]), str(r["sha256"])) for r in raw)
    for record in records:
        if Path(record.name).name != record.name:
            raise ValueError(f"{record.name!r} is not the name of a file in this directory")
    return records


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
                "expertshare_experts": str(_LAYER_VERSIONS[self.format.scheme]),
                "moe_layer": str(self.moe_layer),
                "slab": json.dumps(self.format.to_json()),
            },
            "slabs": {"dtype": "U8", "shape": [self.num_experts, self.format.slab_bytes], "data_offsets": [0, data]},
            "crc32": {"dtype": "U32", "shape": [self.num_experts], "data_offsets": [data, data + 4 * self.num_experts]},
        }
        text = json.dumps(tensors).encode()
        padded = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES - 8
        return padded.to_bytes(8, "little") + text.ljust(padded)

    @staticmethod
    def parse(text: bytes, path: Path) -> LayerHeader:
        """From the JSON of a header; CheckpointError, which names the file, for one that `to_bytes` did not make."""
        try:
            raw = json.loads(text)
            metadata = raw.get("__metadata__", {}) if isinstance(raw, dict) else {}
            if (version := metadata.get("expertshare_experts")) is None:
                raise CheckpointError(
                    f"{path} holds no experts in slabs: expected a file that `expertshare convert` wrote"
                )
            form = SlabFormat.from_json(json.loads(metadata["slab"]), str(path))
            experts, slab_bytes = raw["slabs"]["shape"]
            header = LayerHeader(moe_layer=int(metadata["moe_layer"]), num_experts=int(experts), format=form)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error!r}): copy or convert it again") from error
        if version != str(expected := _LAYER_VERSIONS[form.scheme]):
            raise CheckpointError(
                f"{path} has version {version} of the expert layout, expected {expected} for {form.scheme}: "
                "convert the model again, or use the release of expertshare that wrote it"
            )
        if slab_bytes != form.slab_bytes:
            raise CheckpointError(
                f"{path}: expected slabs of {form.slab_bytes} bytes, got {slab_bytes}: convert it again"
            )
        return header


class LayerFile:
    """A layer file, open for reading. Reads are positioned, so that threads may share it.

    direct: read past the page cache (O_DIRECT); the memory read into must then begin at a page. Raises CheckpointError
    for a file that is missing, truncated, of another version or no layer file, ConfigError where direct cannot be.
    """

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        self.path = path
        self._fd = _open(path, direct=False)
        try:
            text, self.data_start = read_header(self._fd, path, advice="copy or convert it again")
            self.header = LayerHeader.parse(text, path)
            size = os.fstat(self._fd).st_size
            expected = self.data_start + self.header.slabs_bytes + 4 * self.header.num_experts
            if self.data_start % PAGE_BYTES or size != expected:
                raise CheckpointError(
                    f"{path} is damaged: expected {expected} bytes with slabs from a multiple of {PAGE_BYTES} on, got "
                    f"{size} bytes with slabs from {self.data_start} on; copy or convert it again"
                )
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
        what = f"expert {expert}"
        read_exactly(self._fd, memory, self.offset(expert), what=what, path=self.path, advice=_ANEW)

    def checksums(self) -> tuple[int, ...]:
        """The crc32 that each slab must have; of a file that is not read directly, which goes by whole pages."""
        count = self.header.num_experts
        memory = bytearray(4 * count)
        read_exactly(
            self._fd, memoryview(memory), self.offset(count), what="the checksums", path=self.path, advice=_ANEW
        )
        return struct.unpack(f"<{count}I", memory)

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


def open_layers(directory: Path, layout: ExpertLayout, *, direct: bool = False) -> tuple[LayerFile, ...]:
    """The expert files, open for reading, each checked against the manifest. The caller closes them."""
    files: list[LayerFile] = []
    with ExitStack() as stack:  # closes them where one cannot be opened
        for moe_layer, record in enumerate(layout.expert_files):
            files.append(file := stack.enter_context(LayerFile(directory / record.name, direct=direct)))
            expected = LayerHeader(moe_layer=moe_layer, num_experts=layout.num_experts, format=layout.format)
            if file.header != expected:
                raise CheckpointError(
                    f"{file.path} holds {file.header}, expected {expected} by {MANIFEST}: convert the model again"
                )
        stack.pop_all()
    return tuple(files)


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


def read_header(fd: int, path: Path, *, advice: str) -> tuple[bytes, int]:
    """The JSON text at the head of an open safetensors file, and where its data begins. Raises CheckpointError, with
    the advice, for a file that is none."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, os.fstat(fd).st_size - 8):
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {advice}")
    return os.pread(fd, length, 8), 8 + length


def read_exactly(fd: int, memory: memoryview, start: int, *, what: str, path: Path, advice: str) -> None:
    """Fill writable memory from position `start` of an open file. Raises CheckpointError, which says what was read and
    gives the advice, for a read error or a file that ends early."""
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(fd, [memory[done:]], start + done)
        except OSError as error:
            raise CheckpointError(
                f"reading {what} of {path} failed ({error.strerror}): check the disk, then {advice}"
            ) from error
        if count == 0:
            raise CheckpointError(
                f"{path} ends within {what}: expected {len(memory)} bytes at {start}, got {done}; the file was "
                f"truncated, {advice}"
            )
        done += count


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
