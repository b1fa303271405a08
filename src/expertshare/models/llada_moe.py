"""LLaDA-MoE: Qwen3-MoE's graph with full attention; softmax router, not renormalised, no shared expert."""

from __future__ import annotations

from expertshare.config import ModelConfig
from expertshare.errors import ConfigError
from expertshare.models.config_keys import ConfigKeys
from expertshare.models.family import Family, fused_targets, qwen_targets


def read_more(keys: ConfigKeys, config: ModelConfig) -> ModelConfig:
    """The same config. Raises ConfigError for dense layers."""
    frequency = keys.get("moe_layer_freq")
    if frequency not in (None, 1, [1] * config.num_layers):
        raise ConfigError(
            f"config.json: moe_layer_freq={frequency!r} is not supported, expected 1 for each of {config.num_layers} "
            "layers"
        )
    return config


FAMILY = Family(
    name="llada_moe",
    architecture="LLaDAMoEModelLM",
    model_type="llada",
    attention="full",
    activation="softmax",
    block_length=32,  # of decoding where the checkpoint has none: with full attention no block is part of the model
    expert_width="expert_intermediate_size",
    renormalises=False,  # its class never does
    constants={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "qk_layernorm": (True,),
        "moe_router_score_function": ("softmax",),
        "moe_router_enable_expert_bias": (False,),
    },
    supported={
        "clip_qkv": (),
        "routed_scaling_factor": (1, 1.0),
        "router_num_group": (1,),
        "router_topk_group": (1,),
        "shared_expert_intermediate_size": (0,),
    },
    without_effect=("dense_intermediate_size", "intermediate_size"),  # widths of dense layers, of which there are none
    read_more=read_more,
    write_more=lambda config: {"moe_layer_freq": [1] * config.num_layers},
    targets=qwen_targets,
    merged_targets=fused_targets,
    merged_marker=".mlp.experts.gate_up_proj",
)
