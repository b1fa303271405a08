"""Bytes of a model's parts, from configurations and headers alone: nothing is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from expertshare.config import ModelConfig
from expertshare.convert.source import is_expert, read_config
from expertshare.convert.storage import QUANTISED_OR_NOT, slab_format
from expertshare.errors import ConfigError
from expertshare.experts.layout import DENSE, has_expert_layout, read_manifest
from expertshare.experts.slab import SlabFormat
from expertshare.models.checkpoint import StoredTensor, check_names, choose_targets, read_headers, resolve_source
from expertshare.models.family import Target, family_named, quantised_targets
from expertshare.models.loading import own_dtype
from expertshare.models.transformer import MoETransformer


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """dense_bytes: everything but routed experts, as loaded; dense_parameters: those that every position meets, which
    leaves out the input embedding; embedding_bytes: of it, the input embedding, of which a
    forward reads some rows only. slabs: bytes of one expert in memory by scheme, without those that the widths do not
    allow. stored: the scheme on disk, None where experts are not in the expert layout. float_bytes: of an activation.
    """

    config: ModelConfig
    dense_bytes: int
    dense_parameters: int
    embedding_bytes: int
    slabs: Mapping[str, int]
    stored: str | None
    float_bytes: int
    path: Path | None
    probe: Path | None
    """A large file of the checkpoint, for timing reads."""

    @property
    def num_experts(self) -> int:
        """Routed experts of all layers together."""
        return self.config.num_moe_layers * self.config.router.num_experts


def sizes_of(model: str | os.PathLike[str]) -> ModelSizes:
    """Of a directory in either layout, or a hub id. Raises what reading its headers raises."""
    path = resolve_source(model)
    family, config = read_config(path)
    layout = read_manifest(path) if has_expert_layout(path) else None
    if layout is not None:
        stored = read_headers(path, DENSE)
        every = family.targets(config)
        slab, probe = layout.format, path / layout.expert_files[0].name
    else:
        stored = read_headers(path)
        every = choose_targets(family, config, stored)
        slab, probe = None, max((tensor.file for tensor in stored.values()), key=lambda file: file.stat().st_size)
    experts = {place.name for place in every if is_expert(place)}
    places = [place for place in every if not is_expert(place)]
    width = own_dtype(stored, places).itemsize
    if layout is not None and layout.embeddings != "none":
        places = [part for place in places for part in quantised_targets(place)]
    check_names({name: tensor for name, tensor in stored.items() if name not in experts}, places, path)
    if slab is not None and slab.scheme == "none":
        width = 2 if slab.dtype == "bfloat16" else 4
    in_memory = {place: _count(stored[place.name]) * _width(place, width) for place in places}
    return ModelSizes(
        config=config,
        dense_bytes=sum(in_memory.values()),
        dense_parameters=_parameters(config, {place.entry: _count(stored[place.name]) for place in places}),
        embedding_bytes=sum(size for place, size in in_memory.items() if place.entry.startswith("embed.")),
        slabs=_slabs(config, width, slab),
        stored=None if slab is None else slab.scheme,
        float_bytes=width,
        path=path,
        probe=probe,
    )


def sizes_like(config: ModelConfig) -> ModelSizes:
    """Of a model that exists as a configuration only, in bfloat16."""
    with torch.device("meta"):
        state = MoETransformer(config).state_dict()
    places = [place for place in family_named(config.family).targets(config) if not is_expert(place)]
    entries = {place.entry: state[place.entry] for place in places}
    return ModelSizes(
        config=config,
        dense_bytes=sum(t.numel() * (4 if ".router." in name else 2) for name, t in entries.items()),
        dense_parameters=_parameters(config, {name: tensor.numel() for name, tensor in entries.items()}),
        embedding_bytes=entries["embed.weight"].numel() * 2,
        slabs=_slabs(config, 2, None),
        stored=None,
        float_bytes=2,
        path=None,
        probe=None,
    )


def cache_bytes(sizes: ModelSizes, *, positions: int, batch_size: int) -> int:
    """Keys and values of all layers. A model with full attention keeps none."""
    config = sizes.config
    if config.attention == "full":
        return 0
    kept = math.ceil(positions / config.block_length) * config.block_length
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * kept * sizes.float_bytes * batch_size


def _slabs(config: ModelConfig, width: int, own: SlabFormat | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in QUANTISED_OR_NOT:
        try:
            found[name] = slab_format(config, name, expert_dtype="BF16" if width == 2 else "F32").slab_bytes
        except ConfigError:  # the widths do not divide into this scheme's groups
            continue
    if own is not None:
        found[own.scheme] = own.slab_bytes
    return found


def _width(place: Target, width: int) -> int:
    """Bytes of a weight in memory."""
    if place.entry.endswith(".codes"):
        return 1
    return 4 if ".router." in place.entry or place.entry.endswith(".scales") else width


def _parameters(config: ModelConfig, counts: Mapping[str, int]) -> int:
    """Without scales, rows that fill a panel, and the embedding, unless it is the head too."""
    table = config.vocab_size * config.hidden_size
    kept = {
        entry: table if entry.endswith(".codes") else count
        for entry, count in counts.items()
        if not entry.endswith(".scales")
    }
    return sum(n for entry, n in kept.items() if config.tie_embeddings or not entry.startswith("embed."))


def _count(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape)
