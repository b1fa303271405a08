"""Models on disk as something to convert: their tensors, one at a time, from either layout.

Files are read without mapping them, so that memory is what one tensor needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.gguf_file import GGUF_SUFFIX, GgufFile
from expertshare.convert.quantised_checkpoint import QuantisedWeight, unpack
from expertshare.errors import CheckpointError
from expertshare.experts.layout import DENSE, ExpertLayout, LayerFile, open_layers, read_exactly, read_header
from expertshare.models.checkpoint import (
    QUANTISATION,
    StoredTensor,
    check_names,
    check_tensors,
    choose_targets,
    leave_out,
    read_headers,
    read_json,
    read_optional_json,
)
from expertshare.models.family import Family, Target, family_of
from expertshare.models.tokenizer import load_tokenizer, token_ids
from expertshare.models.transformer import MoETransformer
from expertshare.types import ExpertBank, QuantisedBank

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}
"""The dtypes of weights, codes and what belongs to them, by the names that safetensors has for them."""
SAMPLES, SAMPLE_BYTES = 64, 4096
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file. dtype: the format's name, such as BF16. start: of its bytes, behind the
    header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class ExpertSource(Protocol):
    """Where the tensors of a model come from, one at a time: a checkpoint, or random numbers. dense: everything but
    the routed experts, under Hugging Face names."""

    config: ModelConfig
    dense: tuple[TensorEntry, ...]

    def tensor(self, name: str) -> Tensor:
        """One dense tensor in its stored dtype."""
        ...

    def expert(self, moe_layer: int, expert: int) -> ExpertBank | QuantisedBank:
        """One expert, as a bank of one."""
        ...


ExpertPart = tuple[str, int | None]
"""One projection of one expert in a checkpoint: a tensor, and which row of it where it holds all experts'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What the headers of a checkpoint say, checked against its config.json. expert_dtype: of all routed experts.

    files: of every tensor, by its name. parts: by (MoE layer, expert) and projection, "gate_up" or "down", what has to
    be put one behind the other. weights: those that are computed from codes of others. gguf: what holds all tensors in
    place of safetensors files. quantised_by: the method of `weights` or "gguf". fingerprint: see `fingerprint`.
    """

    config: ModelConfig
    dense: tuple[TensorEntry, ...]
    files: Mapping[str, Path]
    expert_dtype: str
    parts: Mapping[tuple[int, int], Mapping[str, Sequence[ExpertPart]]]
    weights: Mapping[str, QuantisedWeight]
    gguf: GgufFile | None
    quantised_by: str | None
    fingerprint: str

    @property
    def is_merged(self) -> bool:
        """Whether one tensor holds all experts of a layer."""
        return any(index is not None for expert in self.parts.values() for _, index in expert["down"])


def plain_config(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json without what it says of quantisation, and that. Raises CheckpointError."""
    raw = read_json(path / "config.json")
    return raw, raw.pop(QUANTISATION, None)


def read_config(path: Path) -> tuple[Family, ModelConfig]:
    """The family that config.json names, and the model that it describes. Raises CheckpointError or ConfigError."""
    raw, _ = plain_config(path)
    family = family_of(raw)
    generation = read_optional_json(path / "generation_config.json")
    return family, family.parse_config(raw, generation, token_ids(load_tokenizer(path)))


def read_checkpoint(path: Path, gguf: Path | None = None) -> Checkpoint:
    """Read headers and configuration. gguf: the file that holds the tensors, in place of safetensors. Raises
    CheckpointError or ConfigError for what cannot be converted."""
    family, config = read_config(path)
    raw, settings = plain_config(path)
    weights: Mapping[str, QuantisedWeight] = {}
    whole, method = None, None
    if gguf is not None:
        names = [target.name for target in family.targets(config)]
        whole, method = GgufFile(gguf, family.name, names, config.num_layers), "gguf"
        stored = in_files = whole.stored
    else:
        stored = in_files = read_headers(path)
        if settings is not None:
            (stored, weights), method = unpack(settings, stored), str(settings.get("quant_method"))
        stored = leave_out(stored, raw, config)
    places = choose_targets(family, config, stored)
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
    dense = [(place.name, stored[place.name]) for place in places if not is_expert(place)]
    return Checkpoint(
        config=config,
        dense=tuple(TensorEntry(name, tensor.dtype, tensor.shape) for name, tensor in dense),
        files={name: tensor.file for name, tensor in {**stored, **in_files}.items()},
        expert_dtype=dtypes[0],
        parts=_parts(experts, config),
        weights=weights,
        gguf=whole,
        quantised_by=method,
        fingerprint=fingerprint(path, in_files),
    )


def is_expert(place: Target) -> bool:
    """Whether a tensor belongs to the routed experts."""
    return ".moe.experts." in place.entry


def moe_layer_of(place: Target, config: ModelConfig) -> int:
    """The MoE layer of a tensor, counted among MoE layers from 0."""
    return int(place.entry.split(".")[1]) - config.num_dense_layers


def _parts(places: Sequence[Target], config: ModelConfig) -> dict[tuple[int, int], dict[str, list[ExpertPart]]]:
    """Every expert's projections, from either layout; gate rows before up rows."""
    parts: dict[tuple[int, int], dict[str, list[ExpertPart]]] = {}
    for place in sorted(places, key=lambda place: place.rows or (0, 0)):
        merged, projection = place.expert is None, place.entry.rpartition(".")[2]
        for expert in range(config.router.num_experts) if place.expert is None else (place.expert,):
            own = parts.setdefault((moe_layer_of(place, config), expert), {"gate_up": [], "down": []})
            own[projection].append((place.name, expert if merged else None))
    return parts


def fingerprint(path: Path, stored: Mapping[str, StoredTensor]) -> str:
    """sha256 over config.json, and over every weights file's name, size, header and samples of its data.

    Samples are SAMPLES stretches of SAMPLE_BYTES spread evenly: enough to tell a retrained model of the same shapes
    apart, cheap for 30 GB. It does not cover every byte, so it finds a wrong source, not a damaged one.
    """
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted({tensor.file for tensor in stored.values()}):
        size = file.stat().st_size
        with file.open("rb") as data:
            digest.update(f"{file.name}\0{size}\0".encode())
            if file.suffix != GGUF_SUFFIX:
                digest.update(read_header(data.fileno(), file, advice=_AGAIN)[0])
            for sample in range(SAMPLES):
                data.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(data.read(SAMPLE_BYTES))
    return digest.hexdigest()


class TensorFile:
    """An open safetensors file. entries: its tensors by name."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        text, self._data_start = read_header(descriptor, path, advice=_AGAIN)
        try:
            self.entries = {
                name: TensorEntry(name, value["dtype"], tuple(value["shape"]), value["data_offsets"][0])
                for name, value in json.loads(text).items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} has no safetensors header: {_AGAIN}") from error

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or row `index` of its first dimension, in memory of its own. Raises CheckpointError for one that
        the file does not have, or not whole."""
        if name not in self.entries:
            raise CheckpointError(f"{self.path} has no tensor {name}: download or convert it again")
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{name} in {self.path} has dtype {entry.dtype}, expected one of {', '.join(DTYPES)}: use the original "
                "checkpoint"
            )
        tensor = torch.empty(entry.shape if index is None else entry.shape[1:], dtype=DTYPES[entry.dtype])
        start = self._data_start + entry.start + (index or 0) * tensor.nbytes
        memory = tensor.reshape(-1).view(torch.uint8).numpy().data
        read_exactly(self._descriptor, memory, start, what=f"tensor {name}", path=self.path, advice=_AGAIN)
        return tensor


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


class CheckpointReader:
    """An ExpertSource over an open checkpoint. Each file is opened once. Use as `with open_checkpoint(...)`."""

    def __init__(self, checkpoint: Checkpoint, files: Mapping[Path, TensorFile]) -> None:
        self.config, self.dense = checkpoint.config, checkpoint.dense
        self._checkpoint, self._files = checkpoint, files

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """One dense tensor, in the checkpoint's own dtype; computed in bfloat16 where the checkpoint holds codes."""
        if self._checkpoint.gguf is not None:
            return self._checkpoint.gguf.read(name)
        if name in self._checkpoint.weights:
            return self._checkpoint.weights[name].read(self._stored)
        return self._stored(name, index)

    def _stored(self, name: str, index: int | None = None) -> Tensor:
        return self._files[self._checkpoint.files[name]].read(name, index)

    def expert(self, moe_layer: int, expert: int) -> ExpertBank:
        """One expert; float16 becomes float32, which holds it exactly."""
        parts = self._checkpoint.parts[moe_layer, expert]
        gate_up, down = (torch.cat([self._part(*part) for part in parts[name]]) for name in ("gate_up", "down"))
        return ExpertBank(gate_up.unsqueeze(0), down.unsqueeze(0))

    def _part(self, name: str, index: int | None) -> Tensor:
        tensor = self.tensor(name, index)
        if not tensor.isfinite().all():
            where = name if index is None else f"{name}[{index}]"
            raise CheckpointError(
                f"{where} in {self._checkpoint.files[name]} holds NaN or infinity: download the checkpoint again"
            )
        return tensor.float() if tensor.dtype == torch.float16 else tensor


@contextmanager
def open_checkpoint(checkpoint: Checkpoint) -> Iterator[CheckpointReader]:
    """The checkpoint with all its files open."""
    with ExitStack() as stack:
        paths = set(checkpoint.files.values()) if checkpoint.gguf is None else ()
        files = {path: stack.enter_context(open_tensors(path)) for path in paths}
        yield CheckpointReader(checkpoint, files)


class LayoutReader:
    """An ExpertSource over a converted directory that is not quantised. Use as `with open_expert_layout(...)`."""

    def __init__(
        self, config: ModelConfig, layout: ExpertLayout, dense: TensorFile, layers: tuple[LayerFile, ...]
    ) -> None:
        self.config, self.dense = config, tuple(dense.entries.values())
        self._format, self._file, self._layers = layout.format, dense, layers

    def tensor(self, name: str) -> Tensor:
        """One dense tensor, as it was converted."""
        return self._file.read(name)

    def expert(self, moe_layer: int, expert: int) -> ExpertBank:
        """One expert as a bank of one."""
        slab_B = torch.empty(self._format.slab_bytes, dtype=torch.uint8)
        self._layers[moe_layer].read_into(expert, slab_B.numpy().data)
        bank = self._format.bank(slab_B.unsqueeze(0))
        assert isinstance(bank, ExpertBank)  # `restore` refuses anything else
        return bank


@contextmanager
def open_expert_layout(path: Path, layout: ExpertLayout) -> Iterator[LayoutReader]:
    """A converted directory with all its files open."""
    _, config = read_config(path)
    with ExitStack() as stack:
        dense = stack.enter_context(open_tensors(path / DENSE))
        layers = tuple(stack.enter_context(layer) for layer in open_layers(path, layout))
        yield LayoutReader(config, layout, dense, layers)
