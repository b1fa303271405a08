"""`expertshare convert`: Hugging Face layout to expert layout and back, resumable, and whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertshare.convert.gguf_file import GGUF_SUFFIX
from expertshare.convert.source import open_checkpoint, open_expert_layout, plain_config, read_checkpoint
from expertshare.convert.storage import FLOAT_NAMES, check_embeddings, settings_of, slab_format
from expertshare.convert.workspace import CHECKSUMS, JOURNAL, is_complete, open_workspace, read_records
from expertshare.convert.writing import Progress, SmallFile, json_bytes, silent, write_expert_layout, write_huggingface
from expertshare.errors import CheckpointError, InputError
from expertshare.experts.layout import (
    DENSE,
    DENSE_INDEX,
    LAYER_PREFIX,
    MANIFEST,
    ExpertLayout,
    FileRecord,
    has_expert_layout,
    read_manifest,
    verify_layer,
)
from expertshare.models.checkpoint import INDEX, WEIGHTS, resolve_source

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

    Checkpoints that others quantised are read too (docs/checkpoints.md): by GPTQ, AWQ, compressed-tensors or FP8, and
    a GGUF file with config.json and tokenizer of its model beside it.
    quantise: none, int8 or int4. quantise_embeddings: of embedding and head, none or int8; other dense tensors stay as
    they are. Memory holds one tensor or one expert at a time. An interrupted run leaves `OUT.partial` and is gone on
    with by the same call. Raises subclasses of ExpertShareError: a source that cannot be read, an OUT that is something
    else, a full disk.
    """
    check_embeddings(quantise_embeddings)
    path, target = _directory_of(source), Path(out).expanduser()
    if has_expert_layout(path):
        raise InputError(
            f"{path} is already in the expert layout: convert the original checkpoint, or use --to huggingface"
        )
    checkpoint = read_checkpoint(path, find_gguf(source, path))
    form = slab_format(checkpoint.config, quantise, group_size=group_size, expert_dtype=checkpoint.expert_dtype)
    settings = settings_of("experts", form, quantise_embeddings, source_sha256=checkpoint.fingerprint)
    if is_complete(target, settings):
        return Converted(target, fresh=False)
    provenance = {
        "kind": "checkpoint",
        "name": os.fspath(source) if not Path(source).is_dir() else path.resolve().name,
        "sha256": checkpoint.fingerprint,
        "expert_dtype": checkpoint.expert_dtype,
        "merged": checkpoint.is_merged,
        **({"quantised_by": checkpoint.quantised_by} if checkpoint.quantised_by else {}),
    }
    files: dict[str, SmallFile] = dict(small_files(path))
    if checkpoint.quantised_by is not None:
        files["config.json"] = json_bytes(plain_config(path)[0])  # what is written is not quantised in their way
    with open_checkpoint(checkpoint) as reader, open_workspace(target, settings) as work:
        write_expert_layout(
            reader,
            work,
            form,
            files=files,
            provenance=provenance,
            embeddings=quantise_embeddings,
            on_progress=on_progress,
        )
    return Converted(target, fresh=True)


def _directory_of(source: str | os.PathLike[str]) -> Path:
    file = Path(source).expanduser()
    return file.parent if file.suffix == GGUF_SUFFIX and file.is_file() else resolve_source(source)


def find_gguf(source: str | os.PathLike[str], path: Path) -> Path | None:
    """The GGUF file that is meant, named itself or as the only one of a directory without safetensors files.

    Raises InputError where several could be, or where the model's own files are not beside it.
    """
    named = Path(source).expanduser()
    found = [named] if named.is_file() else sorted(path.glob(f"*{GGUF_SUFFIX}"))
    if not found or (named.is_dir() and any(path.glob("*.safetensors"))):
        return None
    if len(found) > 1:
        raise InputError(f"{path} holds {len(found)} GGUF files: name one of them, such as {found[0]}")
    if not (path / "config.json").is_file() or not (path / "tokenizer.json").is_file():
        raise InputError(
            f"expected config.json and tokenizer.json of the original model beside {found[0]}, which a GGUF file does "
            "not hold as we read them: download both from the model's repository"
        )
    return found[0]


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
    for what, stored, advice in (
        ("experts", layout.format.scheme, "with --quantise none"),
        ("embedding and head", layout.embeddings, "without --quantise-embeddings"),
    ):
        if stored != "none":
            raise CheckpointError(
                f"{path} holds {what} in {stored}: the original weights cannot be had from it. Use the checkpoint that "
                f"it was made from, or convert that one {advice}"
            )
    if max_shard_bytes < 1:
        raise InputError(f"the size of a shard must be above 0, got {max_shard_bytes}")
    settings = {
        "layout": "huggingface",
        "max_shard_bytes": max_shard_bytes,
        "source_sha256": FileRecord.of(path / MANIFEST).sha256,
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
    if (path / CHECKSUMS).is_file():
        files = tuple(read_records(path / CHECKSUMS)[1].values())
    elif has_expert_layout(path):
        layout = read_manifest(path)
        files = (*layout.expert_files, *layout.dense_files)
    else:
        raise InputError(f"{path} has neither {CHECKSUMS} nor {MANIFEST}: there is nothing to compare it with")
    total, done = sum(record.num_bytes for record in files), 0
    for record in files:
        file = path / record.name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: convert the model again")
        if (size := file.stat().st_size) != record.num_bytes:
            raise CheckpointError(f"{file} has {size} bytes, expected {record.num_bytes}: convert the model again")
        if (found := FileRecord.of(file)) != record:
            if record.name.startswith(LAYER_PREFIX):
                verify_layer(file)  # says which expert it is
            raise CheckpointError(
                f"{file} has checksum {found.sha256[:16]}..., expected {record.sha256[:16]}...: it is damaged, "
                "convert the model again"
            )
        done += record.num_bytes
        on_progress(record.name, done, total)
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


def _original_dtype(layout: ExpertLayout) -> str:
    """What the experts were before they were stored, as safetensors names it."""
    kept: Any = layout.source.get("expert_dtype")
    if FLOAT_NAMES.get(kept) == layout.format.dtype:
        return str(kept)
    return {"float32": "F32", "bfloat16": "BF16"}[layout.format.dtype]
