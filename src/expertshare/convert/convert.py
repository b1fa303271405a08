"""`expertshare convert`: Hugging Face layout to expert layout and back, resumable, and whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.scheme import FLOAT_NAMES, check_embeddings, embeddings_setting, make_scheme
from expertshare.convert.source import open_checkpoint, read_checkpoint, read_config
from expertshare.convert.tensor_file import TensorEntry, TensorFile, open_tensors
from expertshare.convert.workspace import CHECKSUMS, JOURNAL, file_record, is_complete, open_workspace, read_records
from expertshare.convert.writing import Progress, silent, write_expert_layout, write_huggingface
from expertshare.errors import CheckpointError, InputError
from expertshare.experts.layout import (
    DENSE,
    DENSE_INDEX,
    LAYER_PREFIX,
    MANIFEST,
    ExpertLayout,
    has_expert_layout,
    open_layers,
    read_manifest,
    verify_layout,
)
from expertshare.experts.slab_file import LayerFile, file_sha256, verify_layer
from expertshare.models.checkpoint import INDEX, WEIGHTS
from expertshare.models.source import resolve_source
from expertshare.types import ExpertBank

MAX_SHARD_BYTES = 5_000_000_000
_NOT_COPIED = (WEIGHTS, INDEX, DENSE, DENSE_INDEX, MANIFEST, JOURNAL, CHECKSUMS)
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_COPIED_STEMS = ("LICENSE", "NOTICE")


@dataclass(frozen=True, slots=True)
class Converted:
    """Where the result is; fresh is False where it already was there, complete."""

    path: Path
    fresh: bool


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quantise: str = "none",
    group_size: int | None = None,
    quantise_embeddings: str = "none",
    on_progress: Progress = silent,
) -> Converted:
    """Write the expert-major layout (docs/expert-layout.md) of a checkpoint in Hugging Face layout, or of a hub id.

    quantise: none, int8 or int4. quantise_embeddings: of embedding and head, none or int8; other dense tensors stay as
    they are. Memory holds one tensor or one expert at a time. An
    interrupted run leaves `OUT.partial` and is gone on with by the same call. Raises subclasses of ExpertShareError: a
    source that cannot be read, an OUT that is something else, a full disk.
    """
    check_embeddings(quantise_embeddings)
    path, target = resolve_source(source), Path(out).expanduser()
    if has_expert_layout(path):
        raise InputError(
            f"{path} is already in the expert layout: convert the original checkpoint, or use --to huggingface"
        )
    checkpoint = read_checkpoint(path)
    scheme = make_scheme(quantise, group_size=group_size, expert_dtype=checkpoint.expert_dtype)
    settings = {
        "layout": "experts",
        "slab": scheme.slab(checkpoint.config).to_json(),
        "source_sha256": checkpoint.fingerprint,
        **embeddings_setting(quantise_embeddings),
    }
    if is_complete(target, settings):
        return Converted(target, fresh=False)
    provenance = {
        "kind": "checkpoint",
        "name": os.fspath(source) if not Path(source).is_dir() else path.resolve().name,
        "sha256": checkpoint.fingerprint,
        "expert_dtype": checkpoint.expert_dtype,
        "merged": any(part.index is not None for parts in checkpoint.parts.values() for part in parts.values()),
    }
    with open_checkpoint(checkpoint) as reader, open_workspace(target, settings) as work:
        write_expert_layout(
            reader,
            work,
            scheme,
            files=small_files(path),
            provenance=provenance,
            embeddings=quantise_embeddings,
            on_progress=on_progress,
        )
    return Converted(target, fresh=True)


def restore(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Progress = silent,
) -> Converted:
    """Write the Hugging Face layout of a converted directory: the tensors that it was made from, bit for bit.

    Shards are cut anew. Raises CheckpointError for a quantised directory, whose original weights are gone.
    """
    path, target = Path(source).expanduser(), Path(out).expanduser()
    layout = read_manifest(path)
    if layout.format.scheme != "none":
        raise CheckpointError(
            f"{path} holds experts in {layout.format.scheme}: the original weights cannot be had from it. Use the "
            "checkpoint that it was made from, or convert that one with --quantise none"
        )
    if layout.embeddings != "none":
        raise CheckpointError(
            f"{path} holds embedding and head in {layout.embeddings}: the original weights cannot be had from it. Use "
            "the checkpoint that it was made from, or convert that one without --quantise-embeddings"
        )
    if max_shard_bytes < 1:
        raise InputError(f"the size of a shard must be above 0, got {max_shard_bytes}")
    settings = {
        "layout": "huggingface",
        "max_shard_bytes": max_shard_bytes,
        "source_sha256": file_sha256(path / MANIFEST),
    }
    if is_complete(target, settings):
        return Converted(target, fresh=False)
    with open_expert_layout(path, layout) as reader, open_workspace(target, settings) as work:
        write_huggingface(
            reader,
            work,
            expert_dtype=_original_dtype(layout),
            merged=bool(layout.source.get("merged", False)),
            max_shard_bytes=max_shard_bytes,
            files=small_files(path),
            on_progress=on_progress,
        )
    return Converted(target, fresh=True)


def verify(directory: str | os.PathLike[str], on_progress: Progress = silent) -> int:
    """Read every byte of a converted directory and compare checksums; returns how many bytes were right.

    Raises CheckpointError that names the first file which is missing, truncated or damaged.
    """
    path = Path(directory).expanduser()
    if not (path / CHECKSUMS).is_file():
        if not has_expert_layout(path):
            raise InputError(f"{path} has neither {CHECKSUMS} nor {MANIFEST}: there is nothing to compare it with")
        layout = read_manifest(path)
        verify_layout(path, layout)
        return sum(record.num_bytes for record in (*layout.expert_files, *layout.dense_files))
    _, files = read_records(path / CHECKSUMS)
    total, done = sum(record.num_bytes for record in files.values()), 0
    for name, record in files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing: convert the model again")
        size = (path / name).stat().st_size
        if size != record.num_bytes:
            raise CheckpointError(
                f"{path / name} has {size} bytes, expected {record.num_bytes}: convert the model again"
            )
        found = file_record(path / name)
        if found != record:
            if name.startswith(LAYER_PREFIX):
                verify_layer(path / name)  # says which expert it is
            raise CheckpointError(
                f"{path / name} has checksum {found.sha256[:16]}..., expected {record.sha256[:16]}...: it is damaged, "
                "convert the model again"
            )
        done += record.num_bytes
        on_progress(name, done, total)
    return total


def small_files(path: Path) -> Mapping[str, Path]:
    """Configuration, tokenizer and licence files of a model directory: everything but weights, for copying."""
    return {
        file.name: file
        for file in path.iterdir()
        if file.is_file()
        and file.name not in _NOT_COPIED
        and (file.suffix in _COPIED_SUFFIXES or file.name.startswith(_COPIED_STEMS))
    }


class LayoutReader:
    """An ExpertSource over a converted directory that is not quantised."""

    def __init__(
        self, config: ModelConfig, layout: ExpertLayout, dense: TensorFile, layers: tuple[LayerFile, ...]
    ) -> None:
        self._config, self._layout, self._dense, self._layers = config, layout, dense, layers

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model."""
        return self._config

    @property
    def dense(self) -> tuple[TensorEntry, ...]:
        """Everything but the routed experts."""
        return tuple(self._dense.entries.values())

    def tensor(self, name: str) -> Tensor:
        """One dense tensor, as it was converted."""
        return self._dense.read(name)

    def expert(self, moe_layer: int, expert: int) -> ExpertBank:
        """One expert as a bank of one."""
        slab_B = torch.empty(self._layout.format.slab_bytes, dtype=torch.uint8)
        self._layers[moe_layer].read_into(expert, slab_B.numpy().data)
        bank = self._layout.format.bank(slab_B.unsqueeze(0))
        assert isinstance(bank, ExpertBank)  # restore() refused anything else
        return bank


@contextmanager
def open_expert_layout(path: Path, layout: ExpertLayout) -> Iterator[LayoutReader]:
    """A converted directory with all its files open."""
    _, _, config = read_config(path)
    with ExitStack() as stack:
        dense = stack.enter_context(open_tensors(path / DENSE))
        layers = open_layers(path, layout)
        for layer in layers:
            stack.callback(layer.close)
        yield LayoutReader(config, layout, dense, layers)


def _original_dtype(layout: ExpertLayout) -> str:
    """What the experts were before they were stored, as safetensors names it."""
    kept: Any = layout.source.get("expert_dtype")
    if FLOAT_NAMES.get(kept) == layout.format.dtype:
        return str(kept)
    return {"float32": "F32", "bfloat16": "BF16"}[layout.format.dtype]
