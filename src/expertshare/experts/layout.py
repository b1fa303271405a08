"""The manifest of a converted model: what its expert files hold, and how to tell that they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertshare.errors import CheckpointError
from expertshare.experts.slab import SlabFormat
from expertshare.experts.slab_file import LayerFile, LayerHeader, file_sha256, sync_directory

MANIFEST = "expert_layout.json"
DENSE = "dense.safetensors"
"""All tensors that are no expert's, under their Hugging Face names; shards have DENSE_INDEX beside them."""
DENSE_INDEX = "dense.safetensors.index.json"
VERSION = 1
QUANTISED_EMBEDDINGS_VERSION = 3
"""Of a manifest that says how embeddings are stored, which a reader of version 1 would not know. In version 2 their
codes lay row by row, since 3 in panels."""
EMBEDDINGS = ("none", "int8")


LAYER_PREFIX = "experts-"


def layer_file_name(moe_layer: int) -> str:
    """Name of the file with the experts of a MoE layer (0-based among MoE layers)."""
    return f"{LAYER_PREFIX}{moe_layer:05}.safetensors"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that was written: its name in the directory, size and hex digest."""

    name: str
    num_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Plain values by the manifest's names."""
        return {"name": self.name, "bytes": self.num_bytes, "sha256": self.sha256}


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

    def header(self, moe_layer: int) -> LayerHeader:
        """What the file of a layer must say of itself."""
        return LayerHeader(moe_layer=moe_layer, num_experts=self.num_experts, format=self.format)

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain values, version first."""
        return {
            "version": VERSION if self.embeddings == "none" else QUANTISED_EMBEDDINGS_VERSION,
            "slab": self.format.to_json(),
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "expert_files": [record.to_json() for record in self.expert_files],
            "dense_files": [record.to_json() for record in self.dense_files],
            "source": dict(self.source),
            **({} if self.embeddings == "none" else {"embeddings": self.embeddings}),
        }


def has_expert_layout(directory: Path) -> bool:
    """Whether a finished conversion is there: the manifest is written last."""
    return (directory / MANIFEST).exists()


def read_manifest(directory: Path) -> ExpertLayout:
    """The manifest of a converted model. Raises CheckpointError for one that is missing, damaged or of another version,
    or whose files are missing or of another size; their content is for `verify_layout`."""
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
        _check_size(directory / record.name, record)
    return layout


def write_manifest(directory: Path, layout: ExpertLayout) -> None:
    """Mark a conversion as finished: whole or not at all. All its files must be on the disk by now."""
    path = directory / MANIFEST
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(layout.to_json(), indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(directory)


def verify_layout(directory: Path, layout: ExpertLayout) -> None:
    """Read every file and compare it with its digest; CheckpointError names the first that differs."""
    for record in (*layout.expert_files, *layout.dense_files):
        path = directory / record.name
        _check_size(path, record)
        found = file_sha256(path)
        if found != record.sha256:
            raise CheckpointError(
                f"{path} has sha256 {found}, expected {record.sha256}: the file is damaged, copy or convert it again"
            )


def open_layers(directory: Path, layout: ExpertLayout, *, direct: bool = False) -> tuple[LayerFile, ...]:
    """The expert files, open for reading, each checked against the manifest. The caller closes them."""
    files: list[LayerFile] = []
    try:
        for moe_layer, record in enumerate(layout.expert_files):
            files.append(LayerFile(directory / record.name, direct=direct))
            expected, found = layout.header(moe_layer), files[-1].header
            if found != expected:
                raise CheckpointError(
                    f"{files[-1].path} holds {found}, expected {expected} by {MANIFEST}: convert the model again"
                )
    except BaseException:
        for file in files:
            file.close()
        raise
    return tuple(files)


def _parse(raw: Any, path: Path) -> ExpertLayout:
    version = raw.get("version") if isinstance(raw, dict) else None
    if version not in (VERSION, QUANTISED_EMBEDDINGS_VERSION):
        raise CheckpointError(
            f"{path} has version {version} of the expert layout, expected {VERSION} or "
            f"{QUANTISED_EMBEDDINGS_VERSION}: convert the model again, or use "
            "the release of expertshare that wrote it"
        )
    try:
        layout = ExpertLayout(
            format=SlabFormat.from_json(raw["slab"], str(path)),
            num_experts=int(raw["num_experts"]),
            expert_files=_records(raw["expert_files"]),
            dense_files=_records(raw["dense_files"]),
            source=dict(raw["source"]),
            embeddings=_embeddings(raw, version),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): copy or convert the model again") from error
    if layout.num_layers != raw.get("num_layers"):
        raise CheckpointError(f"{path} lists {layout.num_layers} expert files, expected {raw.get('num_layers')}")
    return layout


def _embeddings(raw: Mapping[str, Any], version: int) -> str:
    if version == VERSION:
        return "none"
    if raw["embeddings"] not in EMBEDDINGS:
        raise ValueError(f"embeddings {raw['embeddings']!r} are none of {', '.join(EMBEDDINGS)}")
    return str(raw["embeddings"])


def _records(raw: list[dict[str, Any]]) -> tuple[FileRecord, ...]:
    records = tuple(FileRecord(str(r["name"]), int(r["bytes"]), str(r["sha256"])) for r in raw)
    for record in records:
        if Path(record.name).name != record.name:
            raise ValueError(f"{record.name!r} is not the name of a file in this directory")
    return records


def _check_size(path: Path, record: FileRecord) -> None:
    if not path.exists():
        raise CheckpointError(f"{MANIFEST} lists {path}, which is not there: copy or convert the model again")
    size = path.stat().st_size
    if size != record.num_bytes:
        raise CheckpointError(
            f"{path} has {size} bytes, expected {record.num_bytes} by {MANIFEST}: it was truncated or replaced, "
            "copy or convert the model again"
        )
