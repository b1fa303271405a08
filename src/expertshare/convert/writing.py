"""A model's tensors, one expert at a time, into either layout."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertshare.convert.source import DTYPES, ExpertSource, TensorEntry, is_expert, moe_layer_of
from expertshare.convert.storage import QuantisedEmbeddings, as_stored, slab_matrices
from expertshare.convert.workspace import Workspace
from expertshare.experts.layout import DENSE, MANIFEST, ExpertLayout, LayerHeader, layer_file_name
from expertshare.experts.slab import SlabFormat
from expertshare.models.checkpoint import INDEX, WEIGHTS
from expertshare.models.family import Target, family_named
from expertshare.types import ExpertBank

Progress = Callable[[str, int, int], None]
"""Told the file being written, bytes written so far and bytes in all; finished files of an earlier run count."""
Written = Callable[[int], None]
"""Told how many bytes more of a file are written."""
SmallFile = bytes | Path | Callable[[], bytes]
"""Its content, a file to copy, or what makes the content once all tensors are written."""


def silent(name: str, done: int, total: int) -> None:
    """The callback that reports nothing."""


def write_expert_layout(
    source: ExpertSource,
    work: Workspace,
    form: SlabFormat,
    *,
    files: Mapping[str, SmallFile],
    provenance: Mapping[str, Any],
    embeddings: str = "none",
    on_progress: Progress = silent,
) -> None:
    """Fill the workspace with the expert-major layout and publish it: layer files first, the manifest last.

    files: small ones by name (config.json, tokenizer). provenance: for the manifest. embeddings: how embedding and head
    are stored, "none" or "int8". Raises CheckpointError where the disk is full.
    """
    if embeddings != "none":
        source = QuantisedEmbeddings(source)
    num_layers, num_experts = source.config.num_moe_layers, source.config.router.num_experts
    headers = [LayerHeader(moe_layer=layer, num_experts=num_experts, format=form) for layer in range(num_layers)]
    names = [layer_file_name(layer) for layer in range(num_layers)]
    layers = [
        _LargeFile(name, layer_file_bytes(header), partial(write_layer, header, _slabs(source, header)))
        for name, header in zip(names, headers, strict=True)
    ]
    _add_large_files(work, [*layers, _tensors(DENSE, source.dense, lambda name: [source.tensor(name)])], on_progress)
    _add_small_files(work, files)
    layout = ExpertLayout(
        format=form,
        num_experts=num_experts,
        expert_files=tuple(map(work.record, names)),
        dense_files=(work.record(DENSE),),
        source=provenance,
        embeddings=embeddings,
    )
    work.add(MANIFEST, partial(_write_small, json_bytes(layout.to_json())))
    work.publish()


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
    large = [_tensors(name, entries, tensors.pieces) for name, entries in shards.items()]
    _add_large_files(work, large, on_progress)
    small = dict(files)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.num_bytes for entry in tensors.entries)},
            "weight_map": {entry.name: name for name, entries in shards.items() for entry in entries},
        }
        small[INDEX] = json_bytes(index)
    _add_small_files(work, small)
    work.publish()


def write_layer(header: LayerHeader, slabs: Iterable[Tensor], path: Path, written: Written = lambda _: None) -> str:
    """Write a layer file of these slabs (uint8 [slab_bytes]), as many as the header says, in one pass. Returns the
    sha256 of the file."""
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(header.to_bytes())
        checksums: list[int] = []
        for slab_B in slabs:
            assert slab_B.shape == (header.format.slab_bytes,), slab_B.shape
            data = slab_B.numpy().data
            checksums.append(zlib.crc32(data))
            put(data)
            written(len(data))
        put(struct.pack(f"<{header.num_experts}I", *checksums))
    return digest.hexdigest()


def layer_file_bytes(header: LayerHeader) -> int:
    """Size of a layer file: header, slabs, a checksum of four bytes for each."""
    return len(header.to_bytes()) + header.slabs_bytes + 4 * header.num_experts


def write_tensors(
    entries: Sequence[TensorEntry],
    pieces: Callable[[str], Iterable[Tensor]],
    path: Path,
    written: Written = lambda _: None,
) -> None:
    """Write a safetensors file in which `pieces(name)` is asked for one tensor after the other, in the file's order.

    Wider dtypes come first, so that every tensor is aligned to its dtype. The pieces of a tensor, in its dtype, are put
    one behind the other: it need not be in memory as a whole.
    """
    ordered = _in_file_order(entries)
    with path.open("wb") as file:
        file.write(_header(ordered))
        for entry in ordered:
            start = file.tell()
            for piece in pieces(entry.name):
                assert piece.dtype == DTYPES[entry.dtype], entry
                written(file.write(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data))
            assert file.tell() - start == entry.num_bytes, entry


def json_bytes(value: Any) -> bytes:
    """A JSON file as Hugging Face writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True, slots=True)
class _LargeFile:
    """write: fills a path, tells of the bytes that it has written, and may return their sha256."""

    name: str
    num_bytes: int
    write: Callable[[Path, Written], str | None]


def _tensors(name: str, entries: Sequence[TensorEntry], pieces: Callable[[str], Iterable[Tensor]]) -> _LargeFile:
    ordered = _in_file_order(entries)
    num_bytes = len(_header(ordered)) + sum(entry.num_bytes for entry in ordered)
    return _LargeFile(name, num_bytes, partial(write_tensors, entries, pieces))


def _add_large_files(work: Workspace, files: Sequence[_LargeFile], on_progress: Progress) -> None:
    """Those that are not finished, if all of them fit on the disk."""
    work.check_space({file.name: file.num_bytes for file in files})
    done, total = 0, sum(file.num_bytes for file in files)

    def add(file: _LargeFile) -> None:
        def written(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            on_progress(file.name, done, total)

        if work.has(file.name):
            written(file.num_bytes)
        else:
            work.add(file.name, lambda path: file.write(path, written))

    for file in files:
        add(file)


def _add_small_files(work: Workspace, files: Mapping[str, SmallFile]) -> None:
    for name, content in sorted(files.items()):
        if not work.has(name):
            work.add(name, partial(_write_small, content))


def _write_small(content: SmallFile, path: Path) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content())


def _slabs(source: ExpertSource, header: LayerHeader) -> Iterator[Tensor]:
    """The experts of a layer, each in the same memory: uint8 [slab_bytes]."""
    form = header.format
    slab_B = torch.empty(form.slab_bytes, dtype=torch.uint8)
    for expert in range(header.num_experts):
        bank = source.expert(header.moe_layer, expert)
        form.write(slab_B, slab_matrices(as_stored(bank, form) if isinstance(bank, ExpertBank) else bank))
        yield slab_B


class _HuggingFaceTensors:
    """Every tensor of the layout, in pieces of at most one expert."""

    def __init__(self, source: ExpertSource, expert_dtype: str, *, merged: bool) -> None:
        self._source, self._dtype = source, expert_dtype
        family = family_named(source.config.family)
        places = family.merged_targets if merged and family.merged_targets is not None else family.targets
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

    def _expert_entry(self, place: Target) -> TensorEntry:
        config = self._source.config
        rows = config.hidden_size if place.rows is None else place.rows[1] - place.rows[0]
        depth = config.expert_hidden if place.rows is None else config.hidden_size
        shape = (rows, depth) if place.expert is not None else (config.router.num_experts, rows, depth)
        return TensorEntry(place.name, self._dtype, shape)


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
