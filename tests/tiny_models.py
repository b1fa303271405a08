"""The tiny model that rooms without a need of their own test with: LLaDA2's layout, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from expertshare.config import ModelConfig, RouterSpec
from expertshare.lab.tasks.tokenizer import build_tokenizer, save_tokenizer
from expertshare.models import LoadedModel, MoETransformer, initialise, save_model

ROUTER = RouterSpec(
    num_experts=16,
    top_k=4,
    activation="sigmoid",
    renormalise=True,
    scaling=2.5,
    num_groups=4,
    kept_groups=2,
    has_bias=True,
)


def tiny_config(*, vocab_size: int, **changes: Any) -> ModelConfig:
    """Dense first layer, sigmoid router with a bias and groups, a shared expert, blocks of 8; `changes` by field."""
    plain = ModelConfig(
        family="llada2_moe",
        vocab_size=vocab_size,
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        rotary_dim=8,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        num_dense_layers=1,
        dense_hidden=48,
        expert_hidden=16,
        shared_hidden=16,
        router=ROUTER,
        attention="block_causal",
        block_length=8,
        max_positions=128,
        mask_id=0,
        eos_ids=(1,),
        pad_id=2,
    )
    return replace(plain, **changes)


def tiny_loaded(**changes: Any) -> LoadedModel:
    """In memory, float32, with the tasks' tokenizer."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(0))
    config = tiny_config(vocab_size=len(tokenizer), **changes)
    model = MoETransformer(config)
    initialise(model, seed=0, std=0.2)
    return LoadedModel(model=model.eval(), config=config, tokenizer=tokenizer, path=Path("tiny"))


def save_tiny(directory: Path) -> Path:
    """The same on disk, in the Hugging Face layout."""
    save_tokenizer(directory)
    return save_model(tiny_loaded().model, directory)
