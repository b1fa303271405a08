"""The shapes of released models, by name: configurations without weights."""

from __future__ import annotations

from dataclasses import replace

from expertshare.config import ModelConfig, RouterSpec
from expertshare.errors import ConfigError, InputError, nearest

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
