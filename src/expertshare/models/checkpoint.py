"""The tensors of a checkpoint directory: one safetensors file, or shards with an index. Strict about both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.errors import CheckpointError
from expertshare.models.family import Family, Place
from expertshare.models.source import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a safetensors header says of one tensor. dtype: the format's own name, such as BF16."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(directory: Path, weights: str = WEIGHTS) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, by name; reads headers only. weights: name of the file where there are no shards.

    Raises CheckpointError if files and index disagree.
    """
    single, index = directory / weights, directory / f"{weights}.index.json"
    if single.exists() and index.exists():
        raise CheckpointError(f"{directory} holds both {weights} and {index.name}: remove the one that is out of date")
    if single.exists():
        return _read_file(single)
    if not index.exists():
        raise CheckpointError(f"{directory} holds neither {weights} nor {index.name}: is the download complete?")
    return _read_shards(directory, index)


def _read_shards(directory: Path, index: Path) -> dict[str, StoredTensor]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files: download it again")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(listed.values())):
        path = directory / shard
        if Path(shard).name != shard or not path.exists():
            raise CheckpointError(f"{index} names the file {shard!r}, which is not in {directory}: download it again")
        for name, stored in _read_file(path).items():
            if listed.get(name) != shard:
                raise CheckpointError(f"{path} holds {name}, which {index.name} places elsewhere: download both again")
            found[name] = stored
    _complain("are listed in the index but absent from their files", set(listed) - set(found), index)
    return found


def _read_file(path: Path) -> dict[str, StoredTensor]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {n: StoredTensor(path, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}): download it again") from error


def loaded_bytes(tensors: Iterable[StoredTensor], dtype: torch.dtype | None = None) -> int:
    """As loaded: in `dtype`, or in their own, where float16 and float64 become float32."""
    return sum(
        math.prod(tensor.shape)
        * (1 if tensor.dtype == "I8" else dtype.itemsize if dtype is not None else 2 if tensor.dtype == "BF16" else 4)
        for tensor in tensors
    )


def choose_places(family: Family, config: ModelConfig, names: Iterable[str]) -> Sequence[Place]:
    """The places of the layout that the tensor names show: one tensor per expert, or one per layer."""
    if family.merged_places is not None and any(name.endswith(family.merged_marker) for name in names):
        return family.merged_places(config)
    return family.places(config)


def check_names(stored: Mapping[str, StoredTensor], places: Iterable[Place], directory: Path) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly the tensors of the model."""
    wanted = {place.name for place in places}
    missing = wanted - set(stored)
    biases = {name for name in missing if name.endswith("expert_bias")}
    _complain("are missing; without the selection bias the router picks other experts", biases, directory)
    _complain("are missing", missing, directory)
    _complain("are unexpected: they belong to no part of this model", set(stored) - wanted, directory)


def check_tensors(stored: Mapping[str, StoredTensor], places: Iterable[Place], state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for a tensor whose shape or kind of dtype does not fit its place."""
    for place in places:
        tensor, wanted = stored[place.name], tuple(place.of(state[place.entry]).shape)
        if tensor.shape != wanted:
            raise CheckpointError(
                f"{place.name} in {tensor.file} has shape {list(tensor.shape)}, expected {list(wanted)} by config.json"
            )
        expected = ("I8",) if state[place.entry].dtype == torch.int8 else _DTYPES
        if tensor.dtype not in expected:
            raise CheckpointError(
                f"{place.name} in {tensor.file} has dtype {tensor.dtype}, expected one of {', '.join(expected)}: "
                "quantised checkpoints are not supported, use the original one"
            )


def read_tensors(stored: Mapping[str, StoredTensor], places: Iterable[Place]) -> Iterator[tuple[Place, Tensor]]:
    """Each place with its tensor, file by file, so that one tensor at a time is held beside the model."""
    by_file: dict[Path, list[Place]] = {}
    for place in places:
        by_file.setdefault(stored[place.name].file, []).append(place)
    for path, group in by_file.items():
        with _opened(path) as file:
            for place in group:
                yield place, file.get_tensor(place.name)


def _complain(what: str, names: set[str], where: Path) -> None:
    if names:
        first = ", ".join(sorted(names)[:4])
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise CheckpointError(f"{where}: {len(names)} tensors {what}: {first}{more}. Expected the family's full list")
