"""LLaDA2.0, 2.1 and 2.2 (the layout of Ling / Bailing-MoE-v2): sigmoid router with bias, shared expert, dense start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from expertshare.config import ModelConfig
from expertshare.errors import ConfigError
from expertshare.models.config_keys import ConfigKeys
from expertshare.models.family import Family, Target, expert_targets, gated_targets, head_targets


def read_more(keys: ConfigKeys, config: ModelConfig) -> ModelConfig:
    """With dense layers, shared experts, the trained capacity, and the router's groups, scaling and bias."""
    keys.integer("num_nextn_predict_layers", 0, least=0)  # layers that are left out where there are any
    num_dense = keys.integer("first_k_dense_replace", 0, least=0)
    if num_dense >= config.num_layers:
        raise ConfigError(
            f"config.json: first_k_dense_replace={num_dense} leaves no layer with experts, expected fewer than "
            f"num_hidden_layers={config.num_layers}"
        )
    capacity = None if keys.get("expert_capacity") is None else keys.integer("expert_capacity")
    # In 2.0 and 2.1 a missing group count is an error, because routing without the limit would be silently wrong. 2.2
    # still states the counts, and its gate ignores them: with a capacity there is one group.
    num_groups = keys.integer("n_group", 1 if capacity is not None or keys.states("n_group") else None)
    kept_groups = keys.integer("topk_group", 1 if num_groups == 1 or capacity is not None else None)
    if capacity is not None:
        num_groups = kept_groups = 1
    router = replace(
        config.router,
        scaling=keys.number("routed_scaling_factor"),
        num_groups=num_groups,
        kept_groups=kept_groups,
        has_bias=keys.flag("moe_router_enable_expert_bias", True),
    )
    return replace(
        config,
        num_dense_layers=num_dense,
        dense_hidden=keys.integer("intermediate_size") if num_dense else 0,
        shared_hidden=keys.integer("num_shared_experts", 0, least=0) * config.expert_hidden,
        router=router,
        expert_capacity=capacity,
    )


def write_more(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_more` reads. Raises ConfigError for a shared expert that is not so many experts wide."""
    if config.shared_hidden % config.expert_hidden:
        raise ConfigError(
            f"llada2_moe counts shared experts: their width must be a multiple of the expert width "
            f"{config.expert_hidden}, got {config.shared_hidden}"
        )
    return {
        "intermediate_size": config.dense_hidden or None,
        "first_k_dense_replace": config.num_dense_layers,
        "rotary_dim": config.rotary_dim,
        "num_shared_experts": config.shared_hidden // config.expert_hidden,
        "routed_scaling_factor": config.router.scaling,
        "n_group": config.router.num_groups,
        "topk_group": config.router.kept_groups,
        "moe_router_enable_expert_bias": config.router.has_bias,
        "expert_capacity": config.expert_capacity,
    }


def targets(config: ModelConfig) -> list[Target]:
    """The released layout: one tensor per expert and projection."""
    result = _dense_targets(config)
    for index in range(config.num_dense_layers, config.num_layers):
        result += expert_targets(config, f"model.layers.{index}.mlp", f"layers.{index}.moe")
    return result


def merged_targets(config: ModelConfig) -> list[Target]:
    """The layout of training: one tensor per projection, `mlp.experts.gate_proj` [E, F, D], without `.weight`."""
    result = _dense_targets(config)
    for index in range(config.num_dense_layers, config.num_layers):
        name, entry = f"model.layers.{index}.mlp.experts.{{}}_proj", f"layers.{index}.moe.experts.{{}}"
        result += gated_targets(name, entry, config.expert_hidden)
    return result


def _dense_targets(config: ModelConfig) -> list[Target]:
    """Everything but the experts."""
    result = [Target("model.word_embeddings.weight", "embed.weight"), Target("model.norm.weight", "norm.weight")]
    for index in range(config.num_layers):
        source, target = f"model.layers.{index}", f"layers.{index}"
        result += [
            Target(f"{source}.input_layernorm.weight", f"{target}.attention_norm.weight"),
            Target(f"{source}.attention.query_key_value.weight", f"{target}.attention.qkv.weight"),
            Target(f"{source}.attention.query_layernorm.weight", f"{target}.attention.q_norm.weight"),
            Target(f"{source}.attention.key_layernorm.weight", f"{target}.attention.k_norm.weight"),
            Target(f"{source}.attention.dense.weight", f"{target}.attention.out.weight"),
            Target(f"{source}.post_attention_layernorm.weight", f"{target}.mlp_norm.weight"),
        ]
        if index < config.num_dense_layers:
            result += gated_targets(f"{source}.mlp.{{}}_proj.weight", f"{target}.mlp.{{}}.weight", config.dense_hidden)
            continue
        result.append(Target(f"{source}.mlp.gate.weight", f"{target}.moe.router.weight"))
        if config.router.has_bias:
            result.append(Target(f"{source}.mlp.gate.expert_bias", f"{target}.moe.router.bias"))
        if config.shared_hidden:
            name, entry = f"{source}.mlp.shared_experts.{{}}_proj.weight", f"{target}.moe.shared.{{}}.weight"
            result += gated_targets(name, entry, config.shared_hidden)
    return result + head_targets(config)


FAMILY = Family(
    name="llada2_moe",
    architecture="LLaDA2MoeModelLM",
    model_type="llada2_moe",
    attention="block_causal",
    activation="sigmoid",
    block_length=32,  # what 2.0 and 2.1 were trained with; their config.json does not say (2.2 has block_size)
    zero_kv_heads=True,
    rotary_factor=0.5,  # the class's own default
    renormalises=True,  # its class always does
    constants={
        "hidden_act": ("silu",),
        "use_bias": (False,),
        "use_qkv_bias": (False,),
        "use_qk_norm": (True,),
        "use_rmsnorm": (True,),
        "norm_head": (False,),
        "use_sliding_window": (False,),
        "score_function": ("sigmoid",),
        "router_dtype": ("fp32", "float32"),
    },
    supported={
        "attention_bias": (False,),
        "using_split_qkv_in_self_attention": (False,),
    },
    without_effect=(
        "intermediate_size",  # without a dense layer
        "norm_softmax",  # it belongs to norm_head
        "delete_token_id",  # with the next, of edits of LLaDA2.2 that insert and delete: no decoding rule here
        "split_token_id",
    ),
    read_more=read_more,
    write_more=write_more,
    targets=targets,
    merged_targets=merged_targets,
    merged_marker=".mlp.experts.gate_proj",
)
