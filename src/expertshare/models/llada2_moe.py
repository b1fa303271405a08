"""LLaDA2.0, 2.1 and 2.2 (the layout of Ling / Bailing-MoE-v2): sigmoid router with bias, shared expert, dense start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertshare.config import ModelConfig, RouterSpec
from expertshare.errors import ConfigError
from expertshare.models.config_keys import ConfigKeys, read_rope, refuse_sliding_window
from expertshare.models.family import Family, Place, expert_places, head_places, mlp_places
from expertshare.models.token_ids import TokenIds, read_block_length, read_special_ids

BLOCK_LENGTH = 32
"""What LLaDA2.0 and 2.1 were trained with; their config.json does not say (2.2 has block_size)."""

_WITHOUT_EFFECT = ("intermediate_size", "norm_softmax", "delete_token_id", "split_token_id")
"""intermediate_size: without a dense layer. norm_softmax: it belongs to norm_head. The ids: they belong to LLaDA2.2's
insert and delete edits, which are not among the decoding rules here."""


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: TokenIds) -> ModelConfig:
    """ModelConfig of a LLaDA2 config.json; ConfigError names the key that is missing, unknown or unsupported."""
    keys = ConfigKeys(raw)
    _refuse_unsupported(keys)
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", hidden // heads)
    theta, rotary_dim = read_rope(keys, head_dim)
    ids = read_special_ids(keys, generation, tokenizer)
    num_layers = keys.integer("num_hidden_layers")
    num_dense = keys.integer("first_k_dense_replace", 0, least=0)
    if num_dense >= num_layers:
        raise ConfigError(
            f"config.json: first_k_dense_replace={num_dense} leaves no layer with experts, expected fewer than "
            f"num_hidden_layers={num_layers}"
        )
    expert_hidden = keys.integer("moe_intermediate_size")
    config = ModelConfig(
        family="llada2_moe",
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", least=0) or heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=theta,
        rms_norm_eps=keys.number("rms_norm_eps"),
        num_dense_layers=num_dense,
        dense_hidden=keys.integer("intermediate_size") if num_dense else 0,
        expert_hidden=expert_hidden,
        shared_hidden=keys.integer("num_shared_experts", 0, least=0) * expert_hidden,
        router=_router(keys),
        attention="block_causal",
        block_length=read_block_length(keys, generation, BLOCK_LENGTH),
        max_positions=keys.integer("max_position_embeddings"),
        mask_id=ids.mask,
        eos_ids=ids.eos,
        pad_id=ids.pad,
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        expert_capacity=_expert_capacity(keys),
    )
    keys.refuse_unread(_WITHOUT_EFFECT)
    return config


def _refuse_unsupported(keys: ConfigKeys) -> None:
    keys.expect("hidden_act", "silu")
    for key in ("use_bias", "use_qkv_bias", "norm_head", "attention_bias", "using_split_qkv_in_self_attention"):
        keys.expect(key, False)
    keys.expect("use_rmsnorm", True)
    keys.expect("use_qk_norm", True)
    keys.expect("score_function", "sigmoid")
    keys.expect("router_dtype", "fp32", "float32")
    keys.expect("num_nextn_predict_layers", 0)
    refuse_sliding_window(keys)


def _expert_capacity(keys: ConfigKeys) -> int | None:
    return None if keys.get("expert_capacity") is None else keys.integer("expert_capacity")


def _router(keys: ConfigKeys) -> RouterSpec:
    # LLaDA2.2 routes without groups and may leave the keys out; in 2.0 and 2.1 a missing group count is an error,
    # because routing without the limit would be silently wrong.
    no_groups = 1 if keys.get("expert_capacity") is not None or keys.states("n_group") else None
    num_groups = keys.integer("n_group", no_groups)
    return RouterSpec(
        num_experts=keys.integer("num_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        activation="sigmoid",
        renormalise=keys.flag("norm_topk_prob", True),
        scaling=keys.number("routed_scaling_factor"),
        num_groups=num_groups,
        kept_groups=keys.integer("topk_group", 1 if num_groups == 1 else None),
        has_bias=keys.flag("moe_router_enable_expert_bias", True),
    )


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of this model, in the released form; `parse_config` gives the same ModelConfig back."""
    router = config.router
    if config.shared_hidden % config.expert_hidden:
        raise ConfigError(
            f"llada2_moe counts shared experts: their width must be a multiple of the expert width "
            f"{config.expert_hidden}, got {config.shared_hidden}"
        )
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.dense_hidden or None,
        "num_hidden_layers": config.num_layers,
        "first_k_dense_replace": config.num_dense_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rotary_dim": config.rotary_dim,
        "partial_rotary_factor": config.rotary_dim / config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "norm_head": False,
        "use_sliding_window": False,
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "moe_intermediate_size": config.expert_hidden,
        "num_shared_experts": config.shared_hidden // config.expert_hidden,
        "norm_topk_prob": router.renormalise,
        "routed_scaling_factor": router.scaling,
        "n_group": router.num_groups,
        "topk_group": router.kept_groups,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": router.has_bias,
        "expert_capacity": config.expert_capacity,
        "block_size": config.block_length,
        "mask_token_id": config.mask_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "pad_token_id": config.pad_id,
    }


def places(config: ModelConfig) -> list[Place]:
    """The released layout: one tensor per expert and projection."""
    result = _dense_places(config)
    for index in range(config.num_dense_layers, config.num_layers):
        result += expert_places(config, f"model.layers.{index}.mlp", f"layers.{index}.moe")
    return result


def merged_places(config: ModelConfig) -> list[Place]:
    """The layout of training: one tensor per projection, `mlp.experts.gate_proj` [E, F, D], without `.weight`."""
    result, inner = _dense_places(config), config.expert_hidden
    for index in range(config.num_dense_layers, config.num_layers):
        source, target = f"model.layers.{index}.mlp.experts", f"layers.{index}.moe.experts"
        result += [
            Place(f"{source}.gate_proj", f"{target}.gate_up", rows=(0, inner)),
            Place(f"{source}.up_proj", f"{target}.gate_up", rows=(inner, 2 * inner)),
            Place(f"{source}.down_proj", f"{target}.down"),
        ]
    return result


def _dense_places(config: ModelConfig) -> list[Place]:
    """Everything but the experts."""
    result = [Place("model.word_embeddings.weight", "embed.weight"), Place("model.norm.weight", "norm.weight")]
    for index in range(config.num_layers):
        source, target = f"model.layers.{index}", f"layers.{index}"
        result += [
            Place(f"{source}.input_layernorm.weight", f"{target}.attention_norm.weight"),
            Place(f"{source}.attention.query_key_value.weight", f"{target}.attention.qkv.weight"),
            Place(f"{source}.attention.query_layernorm.weight", f"{target}.attention.q_norm.weight"),
            Place(f"{source}.attention.key_layernorm.weight", f"{target}.attention.k_norm.weight"),
            Place(f"{source}.attention.dense.weight", f"{target}.attention.out.weight"),
            Place(f"{source}.post_attention_layernorm.weight", f"{target}.mlp_norm.weight"),
        ]
        if index < config.num_dense_layers:
            result += mlp_places(f"{source}.mlp", f"{target}.mlp", config.dense_hidden)
            continue
        result.append(Place(f"{source}.mlp.gate.weight", f"{target}.moe.router.weight"))
        if config.router.has_bias:
            result.append(Place(f"{source}.mlp.gate.expert_bias", f"{target}.moe.router.bias"))
        if config.shared_hidden:
            result += mlp_places(f"{source}.mlp.shared_experts", f"{target}.moe.shared", config.shared_hidden)
    return result + head_places(config)


LLADA2_MOE = Family(
    name="llada2_moe",
    parse_config=parse_config,
    to_config=to_config,
    places=places,
    merged_places=merged_places,
    merged_marker=".mlp.experts.gate_proj",
)
