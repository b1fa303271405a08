"""A model's tensors, one expert at a time, into either layout."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.scheme import ExpertStorage, QuantisedEmbeddings
from expertshare.convert.source import ExpertSource, is_expert
from expertshare.convert.tensor_file import DTYPES, TensorEntry, file_bytes, write_tensors
from expertshare.convert.workspace import FileChecksum, Workspace
from expertshare.experts.layout import DENSE, MANIFEST, ExpertLayout, FileRecord, layer_file_name, write_manifest
from expertshare.experts.slab_file import LayerHeader, LayerWriter
from expertshare.models.checkpoint import INDEX, WEIGHTS
from expertshare.models.family import Place
from expertshare.models.table import FAMILIES
from expertshare.types import ExpertBank

Progress = Callable[[str, int, int], None]
"""Told the file being written, bytes written so far and bytes in all; finished files of an earlier run count."""


SmallFile = bytes | Path | Callable[[], bytes]
"""Its content, a file to copy, or what makes the content once all tensors are written."""


def silent(name: str, done: int, total: int) -> None:
    """The callback that reports nothing."""


@dataclass(slots=True)
class _Meter:
    """Adds up bytes over files."""

    total: int
    on_progress: Progress
    done: int = 0

    def advance(self, name: str, num_bytes: int) -> None:
        self.done += num_bytes
        self.on_progress(name, self.done, self.total)


def write_expert_layout(
    source: ExpertSource,
    work: Workspace,
    scheme: ExpertStorage,
    *,
    files: Mapping[str, SmallFile],
    provenance: Mapping[str, Any],
    embeddings: str = "none",
    on_progress: Progress = silent,
) -> None:
    """Fill the workspace with the expert-major layout and publish it: layer files first, the manifest last.

    files: small ones by name (config.json, tokenizer). provenance: for the manifest. embeddings: how the source is to
    give embedding and head: "none" or "int8".
    Raises CheckpointError where the disk is full.
    """
    config = source.config
    if embeddings != "none":
        source = QuantisedEmbeddings(source)
    headers = [
        LayerHeader(moe_layer=layer, num_experts=config.router.num_experts, format=scheme.slab(config))
        for layer in range(config.num_moe_layers)
    ]
    sizes = {layer_file_name(header.moe_layer): layer_file_bytes(header) for header in headers}
    sizes[DENSE] = file_bytes(source.dense)
    work.check_space(sizes)
    meter = _Meter(sum(sizes.values()), on_progress)
    for header in headers:
        name = layer_file_name(header.moe_layer)
        if work.has(name):
            meter.advance(name, sizes[name])
        else:
            work.add(name, lambda path, header=header: _write_layer(path, header, source, scheme, meter))  # type: ignore[misc]
    _add_tensors(work, DENSE, source.dense, lambda name: [source.tensor(name)], meter)
    _add_small_files(work, files)
    layout = ExpertLayout(
        format=scheme.slab(config),
        num_experts=config.router.num_experts,
        expert_files=tuple(_listed(work, layer_file_name(header.moe_layer)) for header in headers),
        dense_files=(_listed(work, DENSE),),
        source=provenance,
        embeddings=embeddings,
    )
    work.add(MANIFEST, lambda path: _write_manifest(path, layout))
    work.publish()


def layer_file_bytes(header: LayerHeader) -> int:
    """Size of a layer file: header, slabs, a checksum of four bytes for each."""
    return len(header.to_bytes()) + header.slabs_bytes + 4 * header.num_experts


def write_huggingface(
    source: ExpertSource,
    work: Workspace,
    *,
    expert_dtype: str,
    merged: bool,
    max_shard_bytes: int,
    files: Mapping[str, SmallFile],
    on_progress: Progress = silent,
) -> None:
    """Fill the workspace with the Hugging Face layout and publish it.

    expert_dtype: of the routed experts in the files; float16 experts are float32 in a slab. merged: experts of a layer
    as one tensor, where the family has that layout. One file if it fits max_shard_bytes, else shards with an index.
    """
    tensors = _HuggingFaceTensors(source, expert_dtype, merged=merged)
    shards = _shards(tensors.entries, max_shard_bytes)
    sizes = {name: file_bytes(entries) for name, entries in shards.items()}
    work.check_space(sizes)
    meter = _Meter(sum(sizes.values()), on_progress)
    for name, entries in shards.items():
        _add_tensors(work, name, entries, tensors.pieces, meter)
    small: dict[str, SmallFile] = dict(files)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.num_bytes for entry in tensors.entries)},
            "weight_map": {entry.name: name for name, entries in shards.items() for entry in entries},
        }
        small[INDEX] = json_bytes(index)
    _add_small_files(work, small)
    work.publish()


def json_bytes(value: Any) -> bytes:
    """A JSON file as Hugging Face writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


class _HuggingFaceTensors:
    """Every tensor of the layout, in pieces of at most one expert."""

    def __init__(self, source: ExpertSource, expert_dtype: str, *, merged: bool) -> None:
        self._source, self._dtype = source, expert_dtype
        family = FAMILIES[source.config.family]
        places = family.merged_places if merged and family.merged_places is not None else family.places
        self._places = {place.name: place for place in places(source.config)}
        dense = {entry.name: entry for entry in source.dense}
        self.entries = tuple(
            self._expert_entry(place) if is_expert(place) else dense[name] for name, place in self._places.items()
        )
        self._last: tuple[tuple[int, int], ExpertBank] | None = None

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor; one that holds a layer's experts comes expert by expert."""
        place = self._places[name]
        if not is_expert(place):
            yield self._source.tensor(name)
            return
        layer, experts = moe_layer_of(place, self._source.config), self._source.config.router.num_experts
        for expert in range(experts) if place.expert is None else (place.expert,):
            bank = self._expert(layer, expert)
            whole = (bank.gate_up_EHD if place.entry.endswith("gate_up") else bank.down_EDF)[0]
            part = whole if place.rows is None else whole[place.rows[0] : place.rows[1]]
            yield part.to(DTYPES[self._dtype])

    def _expert(self, layer: int, expert: int) -> ExpertBank:
        """Kept until the next one is asked for: its three projections follow each other."""
        if self._last is None or self._last[0] != (layer, expert):
            bank = self._source.expert(layer, expert)
            assert isinstance(bank, ExpertBank)  # quantised sources were refused before
            self._last = ((layer, expert), bank)
        return self._last[1]

    def _expert_entry(self, place: Place) -> TensorEntry:
        config = self._source.config
        rows = config.hidden_size if place.rows is None else place.rows[1] - place.rows[0]
        depth = config.expert_hidden if place.rows is None else config.hidden_size
        shape = (rows, depth) if place.expert is not None else (config.router.num_experts, rows, depth)
        return TensorEntry(place.name, self._dtype, shape)


def moe_layer_of(place: Place, config: ModelConfig) -> int:
    """The MoE layer of a tensor, counted among MoE layers from 0."""
    return int(place.entry.split(".")[1]) - config.num_dense_layers


def _write_layer(
    path: Path, header: LayerHeader, source: ExpertSource, scheme: ExpertStorage, meter: _Meter
) -> FileChecksum:
    slab_B = torch.empty(header.format.slab_bytes, dtype=torch.uint8)
    with LayerWriter(path, header) as writer:
        for expert in range(header.num_experts):
            header.format.write(slab_B, scheme.matrices(source.expert(header.moe_layer, expert)))
            writer.append(slab_B)
            meter.advance(layer_file_name(header.moe_layer), header.format.slab_bytes)
    return FileChecksum(writer.num_bytes, writer.sha256)


def _add_tensors(
    work: Workspace,
    name: str,
    entries: Iterable[TensorEntry],
    pieces: Callable[[str], Iterable[Tensor]],
    meter: _Meter,
) -> None:
    entries = tuple(entries)
    if work.has(name):
        meter.advance(name, file_bytes(entries))
        return

    def told(tensor: str) -> Iterator[Tensor]:
        for piece in pieces(tensor):
            yield piece
            meter.advance(name, piece.nbytes)

    work.add(name, lambda path: write_tensors(path, entries, told))


def _add_small_files(work: Workspace, files: Mapping[str, SmallFile]) -> None:
    for name, content in sorted(files.items()):
        if not work.has(name):
            work.add(name, lambda path, content=content: _write_small(path, content))  # type: ignore[misc]


def _write_small(path: Path, content: SmallFile) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content())


def _write_manifest(path: Path, layout: ExpertLayout) -> None:
    """By the layout's own writer, which names the file itself."""
    write_manifest(path.parent, layout)
    shutil.copyfile(path.parent / MANIFEST, path)


def _listed(work: Workspace, name: str) -> FileRecord:
    record = work.record(name)
    return FileRecord(name, record.num_bytes, record.sha256)


def _shards(entries: Sequence[TensorEntry], max_bytes: int) -> dict[str, tuple[TensorEntry, ...]]:
    """Filled in order; a tensor larger than a shard has one of its own."""
    groups: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.num_bytes
    if len(groups) == 1:
        return {WEIGHTS: tuple(entries)}
    stem = WEIGHTS.removesuffix(".safetensors")
    width = max(5, math.ceil(math.log10(len(groups) + 1)))
    return {
        f"{stem}-{number:0{width}}-of-{len(groups):0{width}}.safetensors": tuple(group)
        for number, group in enumerate(groups, 1)
    }
