"""A Hugging Face checkpoint as something to convert: which tensors are dense, where each expert lies, what it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.tensor_file import TensorEntry, TensorFile, open_tensors
from expertshare.errors import CheckpointError
from expertshare.models.checkpoint import StoredTensor, check_names, check_tensors, choose_places, read_headers
from expertshare.models.family import Family, Place
from expertshare.models.source import read_json, read_optional_json
from expertshare.models.table import family_of
from expertshare.models.tokenizer import load_tokenizer, token_ids
from expertshare.models.transformer import MoETransformer
from expertshare.types import ExpertBank, QuantisedBank

SAMPLES, SAMPLE_BYTES = 64, 4096
_ROLES = {(".gate_up", True): "gate", (".gate_up", False): "up", (".down", True): "down"}


class ExpertSource(Protocol):
    """Where the tensors of a model come from, one at a time: a checkpoint, or random numbers."""

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model."""
        ...

    @property
    def dense(self) -> tuple[TensorEntry, ...]:
        """Everything but the routed experts, under Hugging Face names."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One dense tensor in its stored dtype."""
        ...

    def expert(self, moe_layer: int, expert: int) -> ExpertBank | QuantisedBank:
        """One expert, as a bank of one."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """One projection of one expert in a checkpoint: a whole tensor, or row `index` of one that holds them all."""

    file: Path
    name: str
    index: int | None

    @property
    def key(self) -> str:
        """Where it is, for messages."""
        return self.name if self.index is None else f"{self.name}[{self.index}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What the headers of a checkpoint say, checked against its config.json. expert_dtype: of all routed experts.

    parts: by (MoE layer, expert), the projections gate, up and down. fingerprint: see `fingerprint`.
    """

    path: Path
    config: ModelConfig
    dense: tuple[TensorEntry, ...]
    files: Mapping[str, Path]
    expert_dtype: str
    parts: Mapping[tuple[int, int], Mapping[str, ExpertPart]]
    fingerprint: str


def read_config(path: Path) -> tuple[Mapping[str, Any], Family, ModelConfig]:
    """config.json as it is, its family, and the model it describes. Raises CheckpointError or ConfigError."""
    raw = read_json(path / "config.json")
    family = family_of(raw)
    generation = read_optional_json(path / "generation_config.json")
    return raw, family, family.parse_config(raw, generation, token_ids(load_tokenizer(path)))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read headers and configuration. Raises CheckpointError or ConfigError for what cannot be converted."""
    _, family, config = read_config(path)
    stored = read_headers(path)
    places = choose_places(family, config, stored)
    check_names(stored, places, path)
    with torch.device("meta"):
        check_tensors(stored, places, MoETransformer(config).state_dict())
    experts = [place for place in places if is_expert(place)]
    dtypes = sorted({stored[place.name].dtype for place in experts})
    if len(dtypes) != 1 or dtypes[0] == "F64":
        raise CheckpointError(
            f"{path}: expected all experts in one of BF16, F16 and F32, got {', '.join(dtypes)}: save the checkpoint "
            "anew in one of them"
        )
    return Checkpoint(
        path=path,
        config=config,
        dense=tuple(_entry(place.name, stored[place.name]) for place in places if not is_expert(place)),
        files={name: tensor.file for name, tensor in stored.items()},
        expert_dtype=dtypes[0],
        parts=_parts(experts, stored, config),
        fingerprint=fingerprint(path, sorted({tensor.file for tensor in stored.values()})),
    )


def is_expert(place: Place) -> bool:
    """Whether a tensor belongs to the routed experts."""
    return ".moe.experts." in place.entry


def fingerprint(path: Path, files: list[Path]) -> str:
    """sha256 over config.json, and over every weights file's name, size, header and samples of its data.

    Samples are SAMPLES stretches of SAMPLE_BYTES spread evenly: enough to tell a retrained model of the same shapes
    apart, cheap for 30 GB. It does not cover every byte, so it finds a wrong source, not a damaged one.
    """
    digest = hashlib.sha256()
    digest.update((path / "config.json").read_bytes())
    for file in files:
        size = file.stat().st_size
        with open_tensors(file) as tensors, file.open("rb") as data:
            digest.update(f"{file.name}\0{size}\0".encode())
            digest.update(tensors.header)
            for sample in range(SAMPLES):
                data.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(data.read(SAMPLE_BYTES))
    return digest.hexdigest()


class CheckpointReader:
    """An ExpertSource over an open checkpoint. Each file is opened once. Use as `with open_checkpoint(...)`."""

    def __init__(self, checkpoint: Checkpoint, files: Mapping[Path, TensorFile]) -> None:
        self._checkpoint, self._files = checkpoint, files

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model."""
        return self._checkpoint.config

    @property
    def dense(self) -> tuple[TensorEntry, ...]:
        """Everything but the routed experts."""
        return self._checkpoint.dense

    def tensor(self, name: str) -> Tensor:
        """One dense tensor, in the checkpoint's own dtype."""
        return self._files[self._checkpoint.files[name]].read(name)

    def expert(self, moe_layer: int, expert: int) -> ExpertBank:
        """One expert; float16 becomes float32, which holds it exactly."""
        parts = self._checkpoint.parts[moe_layer, expert]
        gate, up, down = (self._part(parts[role]) for role in ("gate", "up", "down"))
        return ExpertBank(torch.cat((gate, up)).unsqueeze(0), down.unsqueeze(0))

    def _part(self, part: ExpertPart) -> Tensor:
        tensor = self._files[part.file].read(part.name, part.index)
        if not tensor.isfinite().all():
            raise CheckpointError(f"{part.key} in {part.file} holds NaN or infinity: download the checkpoint again")
        return tensor.float() if tensor.dtype == torch.float16 else tensor


@contextmanager
def open_checkpoint(checkpoint: Checkpoint) -> Iterator[CheckpointReader]:
    """The checkpoint with all its files open."""
    with ExitStack() as stack:
        files = {path: stack.enter_context(open_tensors(path)) for path in set(checkpoint.files.values())}
        yield CheckpointReader(checkpoint, files)


def _entry(name: str, stored: StoredTensor) -> TensorEntry:
    return TensorEntry(name, stored.dtype, stored.shape)


def _parts(
    places: list[Place], stored: Mapping[str, StoredTensor], config: ModelConfig
) -> dict[tuple[int, int], dict[str, ExpertPart]]:
    """Every expert's projections, from either layout."""
    parts: dict[tuple[int, int], dict[str, ExpertPart]] = {}
    for place in places:
        moe_layer = int(place.entry.split(".")[1]) - config.num_dense_layers
        merged = place.expert is None
        role = _ROLES[place.entry[place.entry.rindex(".") :], place.rows is None or place.rows[0] == 0]
        for expert in range(config.router.num_experts) if place.expert is None else (place.expert,):
            part = ExpertPart(stored[place.name].file, place.name, expert if merged else None)
            parts.setdefault((moe_layer, expert), {})[role] = part
    return parts
