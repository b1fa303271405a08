"""Tiny random models: block-causal on disk, and both kinds of attention in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from expertshare.config import ModelConfig, RouterSpec
from expertshare.models import LoadedModel, MoETransformer, initialise, load_model, save_model
from expertshare.tasks import build_tokenizer, save_tokenizer

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


def config(vocab_size: int, **changes: Any) -> ModelConfig:
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


def build(attention: str) -> LoadedModel:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(0))
    described = config(len(tokenizer), attention=attention)
    model = MoETransformer(described)
    initialise(model, seed=0, std=0.2)
    return LoadedModel(model=model.eval(), config=described, tokenizer=tokenizer, path=Path("tiny"))


@pytest.fixture(scope="session", params=["block_causal", "full"])
def any_model(request: pytest.FixtureRequest) -> LoadedModel:
    return build(request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tokenizer(directory)
    model = build("block_causal")
    return save_model(model.model, directory)


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint)
