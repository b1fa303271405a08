"""Tiny models of every family, wide enough for groups of 32, saved in the Hugging Face layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from expertshare.config import ModelConfig, RouterSpec
from expertshare.models import MoETransformer, initialise, save_model
from tiny_models import tiny_config

LLADA2 = tiny_config(
    vocab_size=300,
    hidden_size=64,
    head_dim=32,
    rotary_dim=16,
    dense_hidden=96,
    expert_hidden=32,
    shared_hidden=32,
    mask_id=299,
    eos_ids=(298,),
    pad_id=298,
)
_SOFTMAX = RouterSpec(num_experts=8, top_k=2, activation="softmax", renormalise=True)
_ALL_MOE = {"num_dense_layers": 0, "dense_hidden": 0, "shared_hidden": 0}
CONFIGS = {
    "llada2_moe": LLADA2,
    "llada_moe": replace(
        LLADA2, family="llada_moe", router=replace(_SOFTMAX, renormalise=False), attention="full", **_ALL_MOE
    ),
    "sdar_moe": replace(LLADA2, family="sdar_moe", router=_SOFTMAX, **_ALL_MOE),
}


def save_random(config: ModelConfig, directory: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> Path:
    """A random model in the Hugging Face layout."""
    model = MoETransformer(config)
    initialise(model, seed=seed, std=0.2)
    for buffer in model.buffers():
        buffer.copy_(torch.linspace(-0.5, 0.5, buffer.numel()))
    return save_model(model, directory, dtype=dtype)


def read_all(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face layout, one file or shards, by safetensors' own reader."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return load_file(directory / "model.safetensors")
    placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    found: dict[str, Tensor] = {}
    for name in set(placed.values()):
        part = load_file(directory / name)
        assert {tensor: name for tensor in part} == {t: n for t, n in placed.items() if n == name}
        found |= part
    return found


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names, dtypes, shapes and bytes."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(left[name].contiguous().view(torch.uint8), right[name].contiguous().view(torch.uint8))
        for name in left
    )


def directory_bytes(directory: Path) -> dict[str, bytes]:
    """Every file's content by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
