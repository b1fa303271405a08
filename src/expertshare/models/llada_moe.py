"""LLaDA-MoE: Qwen3-MoE's graph with full attention; softmax router, not renormalised, no shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertshare.config import ModelConfig, RouterSpec
from expertshare.errors import ConfigError
from expertshare.models.config_keys import ConfigKeys, read_rope
from expertshare.models.family import Family, qwen_places
from expertshare.models.token_ids import TokenIds, read_block_length, read_special_ids

BLOCK_LENGTH = 32
"""Decoding granularity where the checkpoint does not say one: with full attention no block is part of the model."""

_WITHOUT_EFFECT = ("dense_intermediate_size", "intermediate_size")
"""Widths of dense layers, of which there are none."""


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: TokenIds) -> ModelConfig:
    """ModelConfig of a LLaDA-MoE config.json; ConfigError names the key that is missing, unknown or unsupported."""
    keys = ConfigKeys(raw)
    _refuse_unsupported(keys)
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", hidden // heads)
    theta, rotary_dim = read_rope(keys, head_dim)
    ids = read_special_ids(keys, generation, tokenizer)
    num_layers = keys.integer("num_hidden_layers")
    _refuse_dense_layers(keys, num_layers)
    config = ModelConfig(
        family="llada_moe",
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=theta,
        rms_norm_eps=keys.number("rms_norm_eps"),
        num_dense_layers=0,
        dense_hidden=0,
        expert_hidden=keys.integer("expert_intermediate_size"),
        shared_hidden=0,
        router=RouterSpec(
            num_experts=keys.integer("num_experts"),
            top_k=keys.integer("num_experts_per_tok"),
            activation="softmax",
            renormalise=keys.flag("norm_topk_prob", False),
        ),
        attention="full",
        block_length=read_block_length(keys, generation, BLOCK_LENGTH),
        max_positions=keys.integer("max_position_embeddings"),
        mask_id=ids.mask,
        eos_ids=ids.eos,
        pad_id=ids.pad,
        tie_embeddings=keys.flag("tie_word_embeddings", False),
    )
    keys.refuse_unread(_WITHOUT_EFFECT)
    return config


def _refuse_unsupported(keys: ConfigKeys) -> None:
    keys.expect("hidden_act", "silu")
    keys.expect("attention_bias", False)
    keys.expect("clip_qkv")
    keys.expect("qk_layernorm", True)
    keys.expect("moe_router_score_function", "softmax")
    keys.expect("moe_router_enable_expert_bias", False)
    keys.expect("routed_scaling_factor", 1, 1.0)
    keys.expect("router_num_group", 1)
    keys.expect("router_topk_group", 1)
    keys.expect("shared_expert_intermediate_size", 0)


def _refuse_dense_layers(keys: ConfigKeys, num_layers: int) -> None:
    frequency = keys.get("moe_layer_freq")
    if frequency not in (None, 1, [1] * num_layers):
        raise ConfigError(
            f"config.json: moe_layer_freq={frequency!r} is not supported, expected 1 for each of {num_layers} layers"
        )


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of this model, with the released model_type; `parse_config` gives the same ModelConfig back."""
    return {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "partial_rotary_factor": config.rotary_dim / config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "qk_layernorm": True,
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts": config.router.num_experts,
        "num_experts_per_tok": config.router.top_k,
        "norm_topk_prob": config.router.renormalise,
        "expert_intermediate_size": config.expert_hidden,
        "moe_layer_freq": [1] * config.num_layers,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "block_size": config.block_length,
        "mask_token_id": config.mask_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "pad_token_id": config.pad_id,
    }


LLADA_MOE = Family(name="llada_moe", parse_config=parse_config, to_config=to_config, places=qwen_places)
