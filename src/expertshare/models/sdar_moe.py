"""SDAR-MoE: the graph and names of Qwen3-MoE with block-causal attention; softmax router, renormalised."""

from __future__ import annotations

from expertshare.models.family import Family, fused_targets, qwen_targets

FAMILY = Family(
    name="sdar_moe",
    architecture="SDARMoeForCausalLM",
    model_type="sdar_moe",
    attention="block_causal",
    activation="softmax",
    block_length=None,  # variants were trained with 4 to 64, so that no number is right where the files have none
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
    merged_targets=fused_targets,
    merged_marker=".mlp.experts.gate_up_proj",
)
