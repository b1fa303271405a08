"""SDAR-MoE: the graph and names of Qwen3-MoE with block-causal attention; softmax router, renormalised."""

from __future__ import annotations

from expertshare.models.family import Family, qwen_targets

FAMILY = Family(
    name="sdar_moe",
    architecture="SDARMoeForCausalLM",
    model_type="sdar_moe",
    attention="block_causal",
    activation="softmax",
    block_length=4,  # what SDAR-30B-A3B was trained with; variants with 8 to 64 say so in block_size or block_length
    defaults={"num_key_value_heads": 0},
    constants={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([],),
    },
    without_effect=(
        "intermediate_size",  # no layer is dense
        "debug",  # the rest are switches of the training code
        "ep_size",
        "fuse_cross_entropy",
        "micro_forward",
        "skip_checkpoint",
    ),
    targets=qwen_targets,
)
