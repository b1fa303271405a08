"""Save a model in the released Hugging Face layout of its family."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.errors import CheckpointError, ConfigError
from expertshare.models.checkpoint import INDEX, WEIGHTS
from expertshare.models.quantised_vocabulary import refuse_quantised_vocabulary
from expertshare.models.table import FAMILIES
from expertshare.models.transformer import MoETransformer

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


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
    refuse_quantised_vocabulary(model, "a checkpoint in the Hugging Face layout")
    target = Path(directory)
    dtype = dtype or model.dtype
    if dtype not in _DTYPE_NAMES:
        raise ConfigError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if (target / INDEX).exists():
        raise CheckpointError(f"{target} holds a sharded checkpoint ({INDEX}): choose another directory or remove it")
    target.mkdir(parents=True, exist_ok=True)
    for path in [*_tokenizer_files(tokenizer_dir), *map(Path, extra_files)]:
        if path.resolve() != (target / path.name).resolve():
            shutil.copyfile(path, target / path.name)
    family = FAMILIES[model.config.family]
    _write_json(target / "config.json", {**family.to_config(model.config), "dtype": _DTYPE_NAMES[dtype]})
    _write_json(target / "generation_config.json", generation_config(model.config))
    _write_tensors(target / WEIGHTS, _tensors(model, dtype), like=target / "config.json")
    return target


def _tensors(model: MoETransformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The family's tensors by name, each with memory of its own."""
    state = model.state_dict()
    tensors = {}
    for place in FAMILIES[model.config.family].places(model.config):
        kept = torch.float32 if ".router." in place.entry else dtype
        part = place.of(state[place.entry]).detach()
        tensors[place.name] = part.to("cpu", kept).clone(memory_format=torch.contiguous_format)
    return tensors


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """The generation_config.json of this model."""
    eos = list(config.eos_ids)
    return {
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_id,
        "mask_token_id": config.mask_id,
        "block_length": config.block_length,
    }


def _tokenizer_files(directory: str | os.PathLike[str] | None) -> list[Path]:
    if directory is None:
        return []
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    found = [path for name in names if (path := Path(directory) / name).exists()]
    if not found or found[0].name != "tokenizer.json":
        raise CheckpointError(f"{directory} has no tokenizer.json: name the directory of a tokenizer")
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _write_tensors(path: Path, tensors: dict[str, Tensor], *, like: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    shutil.copymode(like, partial)  # safetensors makes files that only their owner can read
    os.replace(partial, path)
