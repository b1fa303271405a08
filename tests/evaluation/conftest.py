"""A tiny random model in the LLaDA2 layout, in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from expertshare.config import ModelConfig, RouterSpec
from expertshare.models import LoadedModel, MoETransformer, initialise
from expertshare.tasks import build_tokenizer

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


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(0))
    config = ModelConfig(
        family="llada2_moe",
        vocab_size=len(tokenizer),
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
    model = MoETransformer(config)
    initialise(model, seed=0, std=0.2)
    return LoadedModel(model=model.eval(), config=config, tokenizer=tokenizer, path=Path("tiny"))
