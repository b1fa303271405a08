"""SDAR-MoE: the graph and names of Qwen3-MoE with block-causal attention; softmax router, renormalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertshare.config import ModelConfig, RouterSpec
from expertshare.models.config_keys import ConfigKeys, read_rope, refuse_sliding_window
from expertshare.models.family import Family, qwen_places
from expertshare.models.token_ids import TokenIds, read_block_length, read_special_ids

BLOCK_LENGTH = 4
"""What SDAR-30B-A3B was trained with; the variants with 8 to 64 say so in block_size or block_length."""

_WITHOUT_EFFECT = (
    "intermediate_size",  # no layer is dense
    "debug",  # the rest are switches of the training code
    "ep_size",
    "fuse_cross_entropy",
    "micro_forward",
    "skip_checkpoint",
)


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: TokenIds) -> ModelConfig:
    """ModelConfig of an SDAR-MoE config.json; ConfigError names the key that is missing, unknown or unsupported."""
    keys = ConfigKeys(raw)
    keys.expect("hidden_act", "silu")
    keys.expect("attention_bias", False)
    keys.expect("decoder_sparse_step", 1)
    keys.expect("mlp_only_layers", [])
    refuse_sliding_window(keys)
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", hidden // heads)
    theta, rotary_dim = read_rope(keys, head_dim)
    ids = read_special_ids(keys, generation, tokenizer)
    config = ModelConfig(
        family="sdar_moe",
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=keys.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=theta,
        rms_norm_eps=keys.number("rms_norm_eps"),
        num_dense_layers=0,
        dense_hidden=0,
        expert_hidden=keys.integer("moe_intermediate_size"),
        shared_hidden=0,
        router=RouterSpec(
            num_experts=keys.integer("num_experts"),
            top_k=keys.integer("num_experts_per_tok"),
            activation="softmax",
            renormalise=keys.flag("norm_topk_prob"),
        ),
        attention="block_causal",
        block_length=read_block_length(keys, generation, BLOCK_LENGTH),
        max_positions=keys.integer("max_position_embeddings"),
        mask_id=ids.mask,
        eos_ids=ids.eos,
        pad_id=ids.pad,
        tie_embeddings=keys.flag("tie_word_embeddings", False),
    )
    keys.refuse_unread(_WITHOUT_EFFECT)
    return config


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of this model; `parse_config` gives the same ModelConfig back."""
    return {
        "architectures": ["SDARMoeForCausalLM"],
        "model_type": "sdar_moe",
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
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts": config.router.num_experts,
        "num_experts_per_tok": config.router.top_k,
        "norm_topk_prob": config.router.renormalise,
        "moe_intermediate_size": config.expert_hidden,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "block_size": config.block_length,
        "mask_token_id": config.mask_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "pad_token_id": config.pad_id,
    }


SDAR_MOE = Family(name="sdar_moe", parse_config=parse_config, to_config=to_config, places=qwen_places)
