"""Tiny random models in transformers' own classes, written as checkpoints in the layouts that we load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB, MASK, EOS = 61, 60, 59
LAYERS, HIDDEN, EXPERTS = 3, 32, 16

_SHARED_KEYS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000.0,
    "rope_scaling": None,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}

LLADA2_CONFIG: dict[str, Any] = {
    **_SHARED_KEYS,
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 24,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "norm_head": False,
    "norm_softmax": False,
    "using_split_qkv_in_self_attention": False,
    "use_sliding_window": False,
    "pad_token_id": EOS,
}

LLADA_MOE_CONFIG: dict[str, Any] = {
    **_SHARED_KEYS,
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 1,
    "expert_intermediate_size": 24,
    "dense_intermediate_size": 48,
    "shared_expert_intermediate_size": None,
    "attention_bias": False,
    "clip_qkv": None,
    "qk_layernorm": True,
    "norm_topk_prob": None,
    "moe_layer_freq": [1] * LAYERS,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "routed_scaling_factor": 1,
    "router_num_group": None,
    "router_topk_group": None,
}

SDAR_CONFIG: dict[str, Any] = {
    **_SHARED_KEYS,
    "architectures": ["SDARMoeForCausalLM"],
    "model_type": "sdar_moe",
    "block_size": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "norm_topk_prob": True,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "sliding_window": None,
}


@dataclass(frozen=True)
class Pair:
    """A model of transformers and the directory that holds its weights in a layout of ours."""

    oracle: PreTrainedModel
    directory: Path


def glm4_pair(directory: Path) -> Pair:
    """The LLaDA2 layout: Glm4Moe with per-head norms, half of each head rotated (half rotation, as LLaDA2 does)."""
    config = Glm4MoeConfig(
        **_sizes(heads=4, kv_heads=2, head_dim=16),
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        use_qk_norm=True,
        num_mtp_layers=0,
    )
    oracle = _randomised(Glm4MoeForCausalLM(config))
    write_checkpoint(directory, LLADA2_CONFIG, llada2_names(_saved_tensors(oracle, directory)))
    return Pair(oracle, directory)


def qwen3_pair(directory: Path, config: dict[str, Any], *, renormalise: bool) -> Pair:
    """The LLaDA-MoE and SDAR layouts: Qwen3-MoE, whose names they share."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    oracle = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_sizes(heads=heads, kv_heads=kv_heads, head_dim=config.get("head_dim", HIDDEN // heads)),
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            moe_intermediate_size=24,
            num_experts=EXPERTS,
            norm_topk_prob=renormalise,
        )
    )
    write_checkpoint(directory, config, _saved_tensors(_randomised(oracle), directory))
    return Pair(oracle, directory)


def fused_pair(directory: Path, config: dict[str, Any], *, renormalise: bool) -> Pair:
    """`qwen3_pair` with a layer's experts in two tensors, as transformers 5 has them, and its name for their number."""
    pair = qwen3_pair(directory, config, renormalise=renormalise)
    tensors = {name: tensor.contiguous() for name, tensor in pair.oracle.state_dict().items()}
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in tensors)
    renamed = {"num_local_experts" if key == "num_experts" else key: value for key, value in config.items()}
    write_checkpoint(directory, renamed, tensors)
    return pair


def olmoe_pair(directory: Path) -> Pair:
    """The LLaDA-MoE layout as OLMoE: one head, where a norm over the projection and one per head are the same."""
    oracle = OlmoeForCausalLM(
        OlmoeConfig(
            **{k: v for k, v in _sizes(heads=1, kv_heads=1, head_dim=HIDDEN).items() if k != "head_dim"},
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            intermediate_size=24,
            num_experts=EXPERTS,
            norm_topk_prob=False,
            eos_token_id=EOS,
        )
    )
    config = {**LLADA_MOE_CONFIG, "num_attention_heads": 1, "num_key_value_heads": 1}
    write_checkpoint(directory, config, _saved_tensors(_randomised(oracle), directory))
    return Pair(oracle, directory)


def llada2_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Glm4Moe's names turned into LLaDA2's: q, k and v fused in this order, other words for the rest."""
    renamed = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.partition("self_attn.")
        if last in ("k_proj.weight", "v_proj.weight"):
            continue
        if last == "q_proj.weight":
            parts = [tensors[f"{prefix}self_attn.{p}_proj.weight"] for p in "qkv"]
            renamed[f"{prefix}attention.query_key_value.weight"] = torch.cat(parts)
            continue
        name = name.replace("self_attn.q_norm", "attention.query_layernorm")
        name = name.replace("self_attn.k_norm", "attention.key_layernorm")
        name = name.replace("self_attn.o_proj", "attention.dense")
        name = name.replace("embed_tokens", "word_embeddings")
        renamed[name.replace("e_score_correction_bias", "expert_bias")] = tensor
    return renamed


def merged_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LLaDA2's merged layout: the experts of a layer stacked into one tensor per projection, without `.weight`."""
    merged = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in tensors:
        head, found, tail = name.partition(".experts.0.")
        if found:
            stack = [tensors[f"{head}.experts.{e}.{tail}"] for e in range(EXPERTS)]
            merged[f"{head}.experts.{tail.removesuffix('.weight')}"] = torch.stack(stack)
    return merged


def write_checkpoint(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """config.json and one safetensors file, and nothing else."""
    for old in directory.glob("*.json"):
        old.unlink()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def read_checkpoint(directory: Path) -> dict[str, Tensor]:
    """All tensors of a one-file checkpoint."""
    return load_file(directory / "model.safetensors")


def _sizes(*, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_experts_per_tok": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }


def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Every weight random and large enough to matter, norms and (positive and negative) selection biases included."""
    generator = torch.Generator().manual_seed(20261122)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1.0 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


def _saved_tensors(model: PreTrainedModel, directory: Path) -> dict[str, Tensor]:
    """The tensors as transformers itself writes them: one per expert and projection."""
    model.save_pretrained(directory)
    return read_checkpoint(directory)
