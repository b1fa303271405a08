"""A model's directory: found or downloaded, its JSON and tensors read strictly, and written in the released layout."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.errors import CheckpointError, ConfigError, InputError
from expertshare.measure.report import write_json
from expertshare.models.family import Family, Target, family_named, special_ids
from expertshare.types import QuantisedTable

if TYPE_CHECKING:
    from expertshare.models.transformer import MoETransformer

_log = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUANTISATION = "quantization_config"
"""The key of config.json by which others say how they quantised the weights."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
"""Weights, configurations and tokenizer files; never code."""
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
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
        listed = read_json(index).get("weight_map")
        if isinstance(listed, dict) and set(listed.values()) == {weights}:
            return _read_shards(directory, index)
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


def refuse_quantised(raw: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for weights that others quantised, which are converted first. raw: config.json."""
    if QUANTISATION in raw:
        raise CheckpointError(
            f"expected plain weights in {path}, got some that config.json says are quantised: convert them once, by "
            f"expertshare convert {path} OUT --quantise int4 (or int8, or none for bfloat16)"
        )


def leave_out(
    stored: Mapping[str, StoredTensor], raw: Mapping[str, Any], config: ModelConfig
) -> dict[str, StoredTensor]:
    """The tensors that our computation has a use for. raw: config.json.

    Left out: rotary frequencies, which follow from config.json; a stored head where it is the embedding; and layers
    that predict further tokens, behind the others, where config.json announces them, which is logged.
    """
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        kept.pop("lm_head.weight", None)
    if raw.get("num_nextn_predict_layers"):
        layer = re.compile(r"model\.layers\.(\d+)\.")
        further = {name for name in kept if (m := layer.match(name)) and int(m[1]) >= config.num_layers}
        further |= {name for name in kept if name.startswith(("mtp.", "model.mtp."))}
        if further:
            _log.warning("left out %d tensors of layers that predict further tokens (MTP)", len(further))
        kept = {name: kept[name] for name in kept if name not in further}
    return kept


def choose_targets(family: Family, config: ModelConfig, names: Iterable[str]) -> Sequence[Target]:
    """The targets of the layout that the tensor names show: one tensor per expert, or one per layer."""
    if family.merged_targets is not None and any(name.endswith(family.merged_marker) for name in names):
        return family.merged_targets(config)
    return family.targets(config)


def check_names(stored: Mapping[str, StoredTensor], targets: Iterable[Target], directory: Path) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly the tensors of the model."""
    wanted = {target.name for target in targets}
    missing = wanted - set(stored)
    biases = {name for name in missing if name.endswith("expert_bias")}
    _complain("are missing; without the selection bias the router picks other experts", biases, directory)
    _complain("are missing", missing, directory)
    _complain("are unexpected: they belong to no part of this model", set(stored) - wanted, directory)


def check_tensors(stored: Mapping[str, StoredTensor], targets: Iterable[Target], state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for a tensor whose shape or kind of dtype does not fit its target."""
    for target in targets:
        tensor, wanted = stored[target.name], tuple(target.of(state[target.entry]).shape)
        if tensor.shape != wanted:
            raise CheckpointError(
                f"{target.name} in {tensor.file} has shape {list(tensor.shape)}, expected {list(wanted)} by config.json"
            )
        expected = ("I8",) if state[target.entry].dtype == torch.int8 else _DTYPES
        if tensor.dtype not in expected:
            raise CheckpointError(
                f"{target.name} in {tensor.file} has dtype {tensor.dtype}, expected one of {', '.join(expected)}: "
                "quantised checkpoints are not supported, use the original one"
            )


def read_tensors(stored: Mapping[str, StoredTensor], targets: Iterable[Target]) -> Iterator[tuple[Target, Tensor]]:
    """Each target with its tensor, file by file, so that one tensor at a time is held beside the model."""
    by_file: dict[Path, list[Target]] = {}
    for target in targets:
        by_file.setdefault(stored[target.name].file, []).append(target)
    for path, group in by_file.items():
        with _opened(path) as file:
            for target in group:
                yield target, file.get_tensor(target.name)


def _complain(what: str, names: set[str], where: Path) -> None:
    if names:
        first = ", ".join(sorted(names)[:4])
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise CheckpointError(f"{where}: {len(names)} tensors {what}: {first}{more}. Expected the family's full list")


def resolve_source(source: str | os.PathLike[str]) -> Path:
    """The local directory of a model. Downloads weights, configs and tokenizer of a hub id, but no code.

    Raises InputError if it is neither a directory nor like a hub id, CheckpointError if the download fails.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise InputError(f"expected the directory of a model, got the file {directory}: name the folder that holds it")
    name = os.fspath(source)
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            f"there is no directory {name!r}, and it is not a hub id (owner/name): check the spelling of the path"
        )
    return _download(name)


def _download(hub_id: str) -> Path:
    # Imported here: it is slow, and a local model needs none of it.
    from huggingface_hub import errors, snapshot_download

    # HfHubHTTPError is an HTTPError of httpx or of httpx2, by the release of the hub client: take the one it uses.
    http_error = next(c for c in errors.HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_PATTERNS)))
    except (http_error, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:  # type: ignore[misc]
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no directory {hub_id!r}, and downloading that id from the hub failed ({reason}). Check the "
            "spelling and the network, or download the model and give its directory"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError names the file and the line if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}: is it the directory of a model?") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON at line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: download it again") from error
    except (OSError, ValueError, RecursionError) as error:  # a folder; numbers too long, or too deep, for Python
        raise CheckpointError(f"{path} cannot be read ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`, but empty where there is no such file."""
    return read_json(path) if path.exists() else {}


def save_model(
    model: MoETransformer,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    extra_files: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """Write config.json, generation_config.json and model.safetensors, so that `load_model` gives the model back.

    dtype: float32 or bfloat16, by default the model's; routers (weight and bias) are always written in float32.
    tokenizer_dir: its tokenizer files are copied. extra_files: copied under their own names (licence, model card).
    Each file is written beside its place and moved there whole, the weights last. Returns the directory. Raises
    CheckpointError where the directory holds a sharded checkpoint, which two layouts side by side would make ambiguous.
    """
    if isinstance(model.embed.weight, QuantisedTable):
        raise ConfigError(
            "a checkpoint in the Hugging Face layout needs float weights, but this model's embedding and head are in "
            "int8: take the checkpoint that it was converted from"
        )
    folder = Path(directory)
    dtype = dtype or model.dtype
    if dtype not in _DTYPE_NAMES:
        raise ConfigError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if (folder / INDEX).exists():
        raise CheckpointError(f"{folder} holds a sharded checkpoint ({INDEX}): choose another directory or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*_tokenizer_files(tokenizer_dir), *map(Path, extra_files)]:
        if path.resolve() != (folder / path.name).resolve():
            shutil.copyfile(path, folder / path.name)
    family = family_named(model.config.family)
    write_json(folder / "config.json", {**family.to_config(model.config), "dtype": _DTYPE_NAMES[dtype]})
    write_json(folder / "generation_config.json", generation_config(model.config))
    partial = folder / f"{WEIGHTS}.partial"
    save_file(_tensors(model, dtype), partial, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", partial)  # safetensors makes files that only their owner can read
    os.replace(partial, folder / WEIGHTS)
    return folder


def _tensors(model: MoETransformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The family's tensors by name, each with memory of its own."""
    state = model.state_dict()
    tensors = {}
    for target in family_named(model.config.family).targets(model.config):
        kept = torch.float32 if ".router." in target.entry else dtype
        part = target.of(state[target.entry]).detach()
        tensors[target.name] = part.to("cpu", kept).clone(memory_format=torch.contiguous_format)
    return tensors


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """The generation_config.json of this model."""
    return {**special_ids(config), "block_length": config.block_length}


def _tokenizer_files(directory: str | os.PathLike[str] | None) -> list[Path]:
    if directory is None:
        return []
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    found = [path for name in names if (path := Path(directory) / name).exists()]
    if not found or found[0].name != "tokenizer.json":
        raise CheckpointError(f"{directory} has no tokenizer.json: name the directory of a tokenizer")
    return found
