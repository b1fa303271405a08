"""Bytes of a model's parts, from configurations and headers alone, and the configurations of released models."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from expertshare.config import ModelConfig, RouterSpec
from expertshare.convert.source import is_expert, read_config
from expertshare.convert.storage import QUANTISED_OR_NOT, slab_format
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.experts.layout import DENSE, has_expert_layout, read_manifest
from expertshare.experts.slab import SlabFormat
from expertshare.models.checkpoint import (
    check_names,
    choose_targets,
    leave_out,
    read_headers,
    read_json,
    refuse_quantised,
    resolve_source,
)
from expertshare.models.family import family_named, quantised_targets
from expertshare.models.loading import own_dtype
from expertshare.models.transformer import MoETransformer


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """dense_bytes: everything but routed experts, as loaded; dense_parameters: those that every position meets, which
    leaves out the input embedding; embedding_bytes: of it, the input embedding, of which a
    forward reads some rows only. slabs: bytes of one expert in memory by scheme, without those that the widths do not
    allow. stored: the scheme on disk, None where experts are not in the expert layout. float_bytes: of an activation.
    path: of the model, and probe: a large file of it, for timing reads; None where there is only a configuration.
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
        stored, every = read_headers(path, DENSE), family.targets(config)
        form, probe = layout.format, path / layout.expert_files[0].name
    else:
        refuse_quantised(raw := read_json(path / "config.json"), path)
        stored = leave_out(read_headers(path), raw, config)
        every = choose_targets(family, config, stored)
        form, probe = None, max((tensor.file for tensor in stored.values()), key=lambda file: file.stat().st_size)
    experts = {target.name for target in every if is_expert(target)}
    targets = [target for target in every if not is_expert(target)]
    width = own_dtype(stored, targets).itemsize
    if form is not None and form.float_dtype is not None:
        width = form.float_dtype.itemsize
    if layout is not None and layout.embeddings != "none":
        targets = [part for target in targets for part in quantised_targets(target)]
    check_names({name: tensor for name, tensor in stored.items() if name not in experts}, targets, path)
    tensors = [(target.entry, math.prod(stored[target.name].shape)) for target in targets]
    return _sizes(config, tensors, width, form, path=path, probe=probe)


def sizes_like(config: ModelConfig) -> ModelSizes:
    """Of a model that exists as a configuration only, in bfloat16."""
    with torch.device("meta"):
        state = MoETransformer(config).state_dict()
    entries = {target.entry for target in family_named(config.family).targets(config) if not is_expert(target)}
    return _sizes(config, [(entry, state[entry].numel()) for entry in entries], width=2)


def _sizes(
    config: ModelConfig,
    tensors: Iterable[tuple[str, int]],
    width: int,
    form: SlabFormat | None = None,
    *,
    path: Path | None = None,
    probe: Path | None = None,
) -> ModelSizes:
    """tensors: entry in the model's state dict, and how many numbers, of every tensor that is no expert's. width: bytes
    of a float. form: of experts on disk."""
    dense = embedding = parameters = 0
    for entry, count in tensors:
        size = count * (
            1 if entry.endswith(".codes") else 4 if ".router." in entry or entry.endswith(".scales") else width
        )
        dense += size
        embedding += size if entry.startswith("embed.") else 0
        if not entry.endswith(".scales") and (config.tie_embeddings or not entry.startswith("embed.")):
            # codes have rows that fill a panel, which no token stands for
            parameters += config.vocab_size * config.hidden_size if entry.endswith(".codes") else count
    slabs: dict[str, int] = {}
    for name in QUANTISED_OR_NOT:
        try:
            slabs[name] = slab_format(config, name, expert_dtype="BF16" if width == 2 else "F32").slab_bytes
        except ConfigError:  # the widths do not divide into this scheme's groups
            continue
    return ModelSizes(
        config=config,
        dense_bytes=dense,
        dense_parameters=parameters,
        embedding_bytes=embedding,
        slabs=slabs if form is None else {**slabs, form.scheme: form.slab_bytes},
        stored=None if form is None else form.scheme,
        float_bytes=width,
        path=path,
        probe=probe,
    )


def cache_bytes(sizes: ModelSizes, *, positions: int, batch_size: int) -> int:
    """Keys and values of all layers. A model with full attention keeps none."""
    config = sizes.config
    if config.attention == "full":
        return 0
    kept = math.ceil(positions / config.block_length) * config.block_length
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * kept * sizes.float_bytes * batch_size


_LLADA2_ROUTER = RouterSpec(
    num_experts=256,
    top_k=8,
    activation="sigmoid",
    renormalise=True,
    scaling=2.5,
    num_groups=8,
    kept_groups=4,
    has_bias=True,
)

_MINI = ModelConfig(
    family="llada2_moe",
    vocab_size=157_184,
    hidden_size=2048,
    num_layers=20,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    rotary_dim=64,
    rope_theta=600_000.0,
    rms_norm_eps=1e-6,
    num_dense_layers=1,
    dense_hidden=5120,
    expert_hidden=512,
    shared_hidden=512,
    router=_LLADA2_ROUTER,
    attention="block_causal",
    block_length=32,
    max_positions=16_384,
    mask_id=156_895,
    eos_ids=(156_892,),
    pad_id=156_892,
)

_FLASH = replace(
    _MINI, hidden_size=4096, num_layers=32, num_heads=32, dense_hidden=9216, expert_hidden=1024, shared_hidden=1024
)

_LLADA_MOE = replace(
    _MINI,
    family="llada_moe",
    num_layers=16,
    num_kv_heads=16,
    rotary_dim=128,
    rope_theta=50_000.0,
    num_dense_layers=0,
    dense_hidden=0,
    expert_hidden=1024,
    shared_hidden=0,
    router=RouterSpec(num_experts=64, top_k=8, activation="softmax", renormalise=False),
    attention="full",
    max_positions=8192,
)

_SDAR = replace(
    _LLADA_MOE,
    family="sdar_moe",
    vocab_size=151_936,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    rope_theta=1_000_000.0,
    expert_hidden=768,
    router=RouterSpec(num_experts=128, top_k=8, activation="softmax", renormalise=True),
    attention="block_causal",
    max_positions=32_768,
    mask_id=151_669,
    eos_ids=(151_645,),
    pad_id=151_643,
)

_DIFFUSION_GEMMA = replace(
    _SDAR,
    family="diffusion_gemma",
    vocab_size=262_144,
    hidden_size=2816,
    num_layers=30,
    num_heads=16,
    num_kv_heads=8,
    head_dim=256,
    rotary_dim=256,
    expert_hidden=704,
    attention="full",
    block_length=256,
    mask_id=4,
    eos_ids=(1,),
    pad_id=0,
)

_TINY = replace(
    _MINI,
    vocab_size=256,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    dense_hidden=96,
    expert_hidden=32,
    shared_hidden=32,
    router=replace(_LLADA2_ROUTER, num_experts=32, top_k=4, num_groups=4, kept_groups=2),
    block_length=8,
    max_positions=512,
    mask_id=0,
    eos_ids=(1,),
    pad_id=2,
)

SHAPES = {
    "llada2.0-mini": _MINI,
    "llada2.0-flash": _FLASH,
    "llada-moe": _LLADA_MOE,
    "sdar-30b-a3b": _SDAR,
    "diffusiongemma": _DIFFUSION_GEMMA,
    "tiny": _TINY,
}
"""What differs from the released models: `expertshare bench` says (lab.bench.cases)."""

VANILLA_UNIQUE = {"llada2.0-mini": 70, "llada2.0-flash": 70, "llada-moe": 59, "sdar-30b-a3b": 55}
"""Unique experts per block and layer under vanilla routing, as published (flash: as mini)."""


def likeness(name: str, *, layers: int | None = None, experts: int | None = None) -> ModelConfig:
    """The configuration of a released model, with fewer layers or another number of experts.

    Raises ConfigError for an unknown name, InputError for layers that leave no experts or that it does not have.
    """
    if name not in VANILLA_UNIQUE:
        raise ConfigError(f"unknown model {name!r}. {nearest(name, VANILLA_UNIQUE)}")
    config = SHAPES[name]
    if experts is not None:
        config = replace(config, router=replace(config.router, num_experts=experts))
    if layers is None:
        return config
    if not config.num_dense_layers < layers <= config.num_layers:
        least, most = config.num_dense_layers + 1, config.num_layers
        raise InputError(f"--layers must lie in {least}..{most} for {name}, got {layers}")
    return replace(config, num_layers=layers)


def default_unique(name: str, config: ModelConfig) -> int:
    """The published figure of this model, or all experts where there are fewer."""
    return min(VANILLA_UNIQUE[name], config.router.num_experts)
