"""The same model in transformers' own classes, on the very same tensors: nothing is copied, except routers where the
class wants them in another dtype. And what one would write around it to decode, block by block with its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.errors import ConfigError, InputError
from expertshare.lab.bench.cases import PeerClass
from expertshare.models import LayerKeyValues, MoETransformer

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

IMPLEMENTATIONS = {"transformers-eager": "eager", "transformers-grouped-mm": "grouped_mm"}
"""Names of the peers, and what transformers calls their experts."""


def build_peer(model: MoETransformer, peer: PeerClass, implementation: str) -> PreTrainedModel:
    """transformers' model over `model`'s weights. implementation: of the experts, "eager" or "grouped_mm"."""
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeForCausalLM, Glm4MoeRotaryEmbedding
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeRotaryEmbedding

    config = peer_config(model.config, peer, implementation)
    rotary: torch.nn.Module
    with torch.device("meta"):
        built: Any = Glm4MoeForCausalLM(config) if peer == "glm4_moe" else Qwen3MoeForCausalLM(config)
    built.load_state_dict(_state(model, keep_router_dtype=peer == "glm4_moe"), assign=True)
    # its frequencies are no part of the state, so they are still on the meta device
    rotary = Glm4MoeRotaryEmbedding(config) if peer == "glm4_moe" else Qwen3MoeRotaryEmbedding(config)
    built.model.rotary_emb = rotary.to(model.device)
    ready: PreTrainedModel = built.requires_grad_(False).eval()
    return ready


def peer_logits(
    peer: PreTrainedModel, tokens_BS: Tensor, positions_BS: Tensor, mask_BSP: Tensor, cache: DynamicCache
) -> Tensor:
    """Logits [B, S, V]; the cache grows by S positions. mask_BSP: bool, True where a query may attend."""
    bias = torch.zeros(mask_BSP.shape, dtype=peer.dtype, device=mask_BSP.device).masked_fill(~mask_BSP, float("-inf"))
    output = peer(
        input_ids=tokens_BS,
        position_ids=positions_BS,
        attention_mask=bias.unsqueeze(1),
        past_key_values=cache,
        use_cache=True,
    )
    logits: Tensor = output.logits
    return logits


def peer_cache(peer: PreTrainedModel, past: Sequence[LayerKeyValues]) -> DynamicCache:
    """A cache that holds these keys and values (none: empty)."""
    from transformers import DynamicCache

    cache = DynamicCache(config=peer.config)
    for index, layer in enumerate(past):
        cache.update(layer.keys_BHSD, layer.values_BHSD, index)
    return cache


def peer_config(config: ModelConfig, peer: PeerClass, implementation: str) -> Any:
    """transformers' configuration of the same architecture, with their experts so implemented."""
    from transformers import Glm4MoeConfig, Qwen3MoeConfig

    router = config.router
    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_experts_per_tok": router.top_k,
        "moe_intermediate_size": config.expert_hidden,
        "norm_topk_prob": router.renormalise,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "sdpa",
        "experts_implementation": implementation,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    if peer == "qwen3_moe":
        return Qwen3MoeConfig(**shared, num_experts=router.num_experts)
    if config.shared_hidden % config.expert_hidden:
        raise ConfigError("glm4_moe counts shared experts: their width must be a multiple of the expert width")
    shared["rope_parameters"]["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    return Glm4MoeConfig(
        **shared,
        intermediate_size=config.dense_hidden,
        n_routed_experts=router.num_experts,
        n_shared_experts=config.shared_hidden // config.expert_hidden,
        n_group=router.num_groups,
        topk_group=router.kept_groups,
        routed_scaling_factor=router.scaling,
        first_k_dense_replace=config.num_dense_layers,
        use_qk_norm=True,
        num_mtp_layers=0,
    )


_RENAMED = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
}


def _state(model: MoETransformer, *, keep_router_dtype: bool) -> dict[str, Tensor]:
    """Our tensors under transformers' names: views, where one of ours is several of theirs."""
    own, config = dict(model.state_dict()), model.config
    sizes = [config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]
    state = {
        "model.embed_tokens.weight": own["embed.weight"],
        "model.norm.weight": own["norm.weight"],
        "lm_head.weight": own["head.weight"],
    }
    for index in range(config.num_layers):
        mine, theirs = f"layers.{index}.", f"model.layers.{index}."
        state |= {f"{theirs}{name}.weight": own[f"{mine}{ours}.weight"] for ours, name in _RENAMED.items()}
        qkv = own[f"{mine}attention.qkv.weight"].split(sizes)
        state |= {f"{theirs}self_attn.{name}_proj.weight": part for name, part in zip("qkv", qkv, strict=True)}
        if index < config.num_dense_layers:
            state |= _mlp(own, f"{mine}mlp", f"{theirs}mlp")
            continue
        router = own[f"{mine}moe.router.weight"]
        state[f"{theirs}mlp.gate.weight"] = router if keep_router_dtype else router.to(model.dtype)
        if f"{mine}moe.router.bias" in own:
            state[f"{theirs}mlp.gate.e_score_correction_bias"] = own[f"{mine}moe.router.bias"]
        for name in ("gate_up", "down"):
            state[f"{theirs}mlp.experts.{name}_proj"] = own[f"{mine}moe.experts.{name}"]
        if config.shared_hidden:
            state |= _mlp(own, f"{mine}moe.shared", f"{theirs}mlp.shared_experts")
    return state


def _mlp(own: dict[str, Tensor], mine: str, theirs: str) -> dict[str, Tensor]:
    parts = dict(zip(("gate", "up"), own[f"{mine}.gate_up.weight"].chunk(2), strict=True))
    parts["down"] = own[f"{mine}.down.weight"]
    return {f"{theirs}.{name}_proj.weight": part for name, part in parts.items()}


def decode_with_peer(
    peer: PreTrainedModel,
    config: ModelConfig,
    prompt: Sequence[int],
    *,
    gen_length: int,
    block_length: int,
    threshold: float,
) -> list[int]:
    """Greedy block diffusion of one prompt, to the end: the rules of our decoder, none of its code.

    Every step commits the masks whose token is more probable than `threshold`, at least the most probable one. A
    finished block is run once more from its final tokens, which is what stays in the cache. Lengths must be whole
    blocks. Raises InputError otherwise, or for full attention.
    """
    if config.attention != "block_causal" or len(prompt) % block_length or gen_length % block_length:
        raise InputError(
            f"the plain loop over transformers decodes block-causal models in whole blocks of {block_length}, got "
            f"{config.attention} attention, a prompt of {len(prompt)} and {gen_length} tokens to generate"
        )
    cache = peer_cache(peer, ())
    answer: list[int] = []
    if prompt:
        _forward(peer, cache, torch.tensor([list(prompt)], device=peer.device), 0, block_length)
    for start in range(len(prompt), len(prompt) + gen_length, block_length):
        block_1L = torch.full((1, block_length), config.mask_id, device=peer.device)
        while bool((masked_L := block_1L[0] == config.mask_id).any()):
            logits_LV = _forward(peer, cache, block_1L, start, block_length)[0]
            cache.crop(-block_length)
            logits_LV = logits_LV[masked_L].float()
            logits_LV[:, config.mask_id] = float("-inf")
            confidence_C, token_C = logits_LV.softmax(dim=-1).max(dim=-1)
            accepted_C = confidence_C > threshold
            accepted_C[confidence_C.argmax()] = True
            place_C = masked_L.nonzero().flatten()
            block_1L[0, place_C[accepted_C]] = token_C[accepted_C]
        if start + block_length < len(prompt) + gen_length:
            _forward(peer, cache, block_1L, start, block_length)
        answer += block_1L[0].tolist()
    return answer


def _forward(peer: PreTrainedModel, cache: DynamicCache, tokens_1S: Tensor, start: int, block_length: int) -> Tensor:
    """Whole blocks from position `start` on, which see themselves and everything before them."""
    end = start + tokens_1S.shape[1]
    queries_S, keys_P = torch.arange(start, end, device=peer.device), torch.arange(end, device=peer.device)
    mask_SP = queries_S.unsqueeze(1) // block_length >= keys_P // block_length
    return peer_logits(peer, tokens_1S, queries_S.unsqueeze(0), mask_SP.unsqueeze(0), cache)
