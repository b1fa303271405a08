"""What a model family is: how its config.json reads, and where its tensors go. One file per family, one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.models.token_ids import TokenIds

ParseConfig = Callable[[Mapping[str, Any], Mapping[str, Any], TokenIds], ModelConfig]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of a checkpoint lives in the model.

    name: in the checkpoint. entry: in the model's state dict. expert: index into the first dimension of a fused
    parameter, None for all of it. rows: half-open range of output features (the second to last dimension), None for
    all of them.
    """

    name: str
    entry: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, whole: Tensor) -> Tensor:
        """The part of the state dict's tensor, as a view."""
        part = whole if self.expert is None else whole[self.expert]
        return part if self.rows is None else part[..., self.rows[0] : self.rows[1], :]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One checkpoint layout of Hugging Face.

    name: the family's key in the table, and ModelConfig.family. parse_config(config.json, generation_config.json,
    tokenizer ids) is strict. to_config is its inverse. places: where each tensor goes. merged_places: the same for a
    layout in which a layer's experts are one tensor, where the family has one; merged_marker is a name (ending) that
    only this layout has.
    """

    name: str
    parse_config: ParseConfig
    to_config: Callable[[ModelConfig], dict[str, Any]]
    places: Callable[[ModelConfig], Sequence[Place]]
    merged_places: Callable[[ModelConfig], Sequence[Place]] | None = None
    merged_marker: str = ""


def expert_places(config: ModelConfig, prefix: str, moe: str) -> list[Place]:
    """One tensor per expert and projection: `{prefix}.experts.E.gate_proj.weight` and so on."""
    inner = config.expert_hidden
    places = []
    for expert in range(config.router.num_experts):
        source = f"{prefix}.experts.{expert}"
        places += [
            Place(f"{source}.gate_proj.weight", f"{moe}.experts.gate_up", expert, (0, inner)),
            Place(f"{source}.up_proj.weight", f"{moe}.experts.gate_up", expert, (inner, 2 * inner)),
            Place(f"{source}.down_proj.weight", f"{moe}.experts.down", expert),
        ]
    return places


def mlp_places(prefix: str, target: str, inner: int) -> list[Place]:
    """A dense gated MLP: gate and up become one projection."""
    return [
        Place(f"{prefix}.gate_proj.weight", f"{target}.gate_up.weight", rows=(0, inner)),
        Place(f"{prefix}.up_proj.weight", f"{target}.gate_up.weight", rows=(inner, 2 * inner)),
        Place(f"{prefix}.down_proj.weight", f"{target}.down.weight"),
    ]


def head_places(config: ModelConfig) -> list[Place]:
    """The output head, where it is not the embedding."""
    return [] if config.tie_embeddings else [Place("lm_head.weight", "head.weight")]


def qwen_places(config: ModelConfig) -> list[Place]:
    """Names of OLMoE and Qwen3-MoE: separate query, key and value projections, experts in every layer."""
    result = [Place("model.embed_tokens.weight", "embed.weight"), Place("model.norm.weight", "norm.weight")]
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index in range(config.num_layers):
        source, target = f"model.layers.{index}", f"layers.{index}"
        attention, qkv = f"{source}.self_attn", f"{target}.attention.qkv.weight"
        result += [
            Place(f"{source}.input_layernorm.weight", f"{target}.attention_norm.weight"),
            Place(f"{attention}.q_proj.weight", qkv, rows=(0, q)),
            Place(f"{attention}.k_proj.weight", qkv, rows=(q, q + kv)),
            Place(f"{attention}.v_proj.weight", qkv, rows=(q + kv, q + 2 * kv)),
            Place(f"{attention}.o_proj.weight", f"{target}.attention.out.weight"),
            Place(f"{attention}.q_norm.weight", f"{target}.attention.q_norm.weight"),
            Place(f"{attention}.k_norm.weight", f"{target}.attention.k_norm.weight"),
            Place(f"{source}.post_attention_layernorm.weight", f"{target}.mlp_norm.weight"),
            Place(f"{source}.mlp.gate.weight", f"{target}.moe.router.weight"),
            *expert_places(config, f"{source}.mlp", f"{target}.moe"),
        ]
    return result + head_places(config)
