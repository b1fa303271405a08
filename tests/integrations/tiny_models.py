"""Tiny random models of every class that apply() supports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from . import stand_ins

VOCAB, TOP_K = 50, 4
CANVAS = 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def olmoe() -> Any:
    return OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=16, intermediate_size=24, norm_topk_prob=False))


def qwen3() -> Any:
    sizes = {"num_experts": 16, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes))


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=16, intermediate_size=24))


def glm4() -> Any:
    """Sigmoid, bias, 4 groups of which 2 are kept, a shared expert, a dense first layer."""
    sizes = {"n_routed_experts": 16, "moe_intermediate_size": 24, "intermediate_size": 48, "head_dim": 16}
    groups = {"n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5}
    layers = {"first_k_dense_replace": 1, "num_hidden_layers": 3}
    return Glm4MoeForCausalLM(Glm4MoeConfig(**{**SIZES, **sizes, **groups, **layers}, num_mtp_layers=0))


def diffusion_gemma() -> Any:
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64,
        "num_experts": 16,
        "top_k_experts": TOP_K,
        "moe_intermediate_size": 24,
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "position_embedding_size": 16,
    }
    special = {"boi_token_id": 3, "eoi_token_id": 4, "image_token_id": 5}
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=CANVAS, **special)
    return DiffusionGemmaForBlockDiffusion(config)


NATIVE: dict[str, Callable[[], Any]] = {
    "olmoe": olmoe,
    "qwen3_moe": qwen3,
    "mixtral": mixtral,
    "glm4_moe": glm4,
    "diffusion_gemma": diffusion_gemma,
}
REMOTE: dict[str, Callable[[], Any]] = {
    "llada2": stand_ins.llada2,
    "llada_moe": stand_ins.llada_moe,
    "sdar": stand_ins.sdar,
}
ALL = NATIVE | REMOTE


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Weights large enough that routing differs from token to token."""
    torch.manual_seed(11)
    model = ALL[name]()
    with torch.no_grad():
        if name in NATIVE:
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.4)
            for entry, buffer in model.named_buffers():
                if entry.endswith("e_score_correction_bias"):
                    buffer.normal_(std=0.1)
            for entry, parameter in model.named_parameters():
                if entry.endswith("per_expert_scale"):
                    parameter.uniform_(0.5, 1.5)
    return model.to(dtype).eval().requires_grad_(False)


def tokens(rows: int = 2, length: int = 12, seed: int = 3) -> Tensor:
    return torch.randint(6, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """One forward. DiffusionGemma encodes `ids_BS` and denoises a canvas of fixed random tokens after it."""
    more: dict[str, Any] = {} if mask_BS is None else {"attention_mask": mask_BS}
    if isinstance(model, DiffusionGemmaForBlockDiffusion):
        more["decoder_input_ids"] = tokens(len(ids_BS), CANVAS, seed=5)
        if mask_BS is not None:
            more["decoder_attention_mask"] = torch.nn.functional.pad(mask_BS, (0, CANVAS), value=1)
    with torch.no_grad():
        return model(input_ids=ids_BS, **more).logits
