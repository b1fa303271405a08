"""What a model family is: how its config.json reads and is written, and where its tensors go. One file per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from torch import Tensor

from expertshare.config import ModelConfig, RouterSpec
from expertshare.errors import ConfigError, nearest
from expertshare.models.config_keys import (
    ConfigKeys,
    TokenIds,
    read_block_length,
    read_rope,
    read_special_ids,
    refuse_sliding_window,
)

FAMILIES = ("llada2_moe", "llada_moe", "sdar_moe")
"""Each is a file of this folder with a FAMILY of this name."""

ALIASES = {
    "llada2_moe_veomni": "llada2_moe",  # written by the training code of LLaDA2
    "llada21_moe": "llada2_moe",  # copies of LLaDA2.1 by others
    "lladamoe": "llada_moe",  # copies of LLaDA-MoE by others
    "llada": "llada_moe",  # what LLaDA-MoE's released config.json says, as the dense LLaDA does
}
"""Other values of model_type in config.json."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where one tensor of a checkpoint goes in the model.

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
    """One checkpoint layout of Hugging Face: the keys that every config.json has are read and written here, by these.

    name: as in FAMILIES, and ModelConfig.family. architecture, model_type: as config.json says them. block_length:
    where the files do not say it; None: then they must. rotary_factor: share of a head's features that are rotated,
    where the files do not say it. renormalises: whether the released class divides a token's weights by their sum,
    whatever norm_topk_prob says; None: that key decides. zero_kv_heads: whether num_key_value_heads must be there and 0
    means one for each query head, as elsewhere where the key is missing. expert_width: the key of it. defaults: of keys
    that may be missing.
    constants: keys that the model supports at these values only; the first is written. supported: likewise, but not
    written. without_effect: keys that change nothing here. read_more: completes the config from keys of this family
    alone; write_more is its inverse. targets: where each tensor goes. merged_targets: the same for a layout in which a
    layer's experts are one tensor, where the family has one; merged_marker is a name (ending) that only this has.
    """

    name: str
    architecture: str
    model_type: str
    attention: Literal["block_causal", "full"]
    activation: Literal["softmax", "sigmoid"]
    block_length: int | None
    rotary_factor: float = 1.0
    renormalises: bool | None = None
    zero_kv_heads: bool = False
    expert_width: str = "moe_intermediate_size"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, tuple[Any, ...]]
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    without_effect: Sequence[str] = ()
    read_more: Callable[[ConfigKeys, ModelConfig], ModelConfig] = lambda _, config: config
    write_more: Callable[[ModelConfig], dict[str, Any]] = lambda _: {}
    targets: Callable[[ModelConfig], Sequence[Target]]
    merged_targets: Callable[[ModelConfig], Sequence[Target]] | None = None
    merged_marker: str = ""

    def parse_config(self, raw: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: TokenIds) -> ModelConfig:
        """ModelConfig of config.json, with what generation_config.json and the tokenizer say of special tokens.

        Raises ConfigError that names the key that is missing, unknown or unsupported.
        """
        keys, default = ConfigKeys(raw), self.defaults.get
        for key, values in {**self.constants, **self.supported}.items():
            keys.expect(key, *values)
        refuse_sliding_window(keys)
        hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        head_dim = keys.integer("head_dim", hidden // heads)
        theta, rotary_dim = read_rope(keys, head_dim, self.rotary_factor)
        renormalise = keys.flag("norm_topk_prob", default("norm_topk_prob", self.renormalises))
        config = ModelConfig(
            family=self.name,
            vocab_size=keys.integer("vocab_size"),
            hidden_size=hidden,
            num_layers=keys.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=keys.integer("num_key_value_heads", *((None, 0) if self.zero_kv_heads else (heads, 1)))
            or heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rope_theta=theta,
            rms_norm_eps=keys.number("rms_norm_eps"),
            num_dense_layers=0,
            dense_hidden=0,
            expert_hidden=keys.integer(self.expert_width),
            shared_hidden=0,
            router=RouterSpec(
                num_experts=keys.integer(one_name(keys, "num_experts", "num_local_experts")),
                top_k=keys.integer("num_experts_per_tok"),
                activation=self.activation,
                renormalise=renormalise if self.renormalises is None else self.renormalises,
            ),
            attention=self.attention,
            block_length=read_block_length(keys, generation, self.block_length),
            max_positions=keys.integer("max_position_embeddings"),
            tie_embeddings=keys.flag("tie_word_embeddings", False),
            **read_special_ids(keys, generation, tokenizer),
        )
        config = self.read_more(keys, config)
        keys.refuse_unread(self.without_effect)
        return config

    def to_config(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json of this model, in the released form; `parse_config` gives the same ModelConfig back."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
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
            "tie_word_embeddings": config.tie_embeddings,
            "num_experts": config.router.num_experts,
            "num_experts_per_tok": config.router.top_k,
            "norm_topk_prob": config.router.renormalise,
            self.expert_width: config.expert_hidden,
            **{key: values[0] for key, values in self.constants.items()},
            **self.write_more(config),
            "block_size": config.block_length,
            **special_ids(config),
        }


def one_name(keys: ConfigKeys, *names: str) -> str:
    """That of several names of one number which config.json uses, the first if none; ConfigError where two differ."""
    stated = {name: value for name in names if (value := keys.get(name)) is not None}
    if len(set(map(repr, stated.values()))) > 1:
        raise ConfigError(
            f"config.json: expected one value of {' and '.join(names)}, got {stated}: correct one of them"
        )
    return next(iter(stated), names[0])


def special_ids(config: ModelConfig) -> dict[str, Any]:
    """The ids of a model's special tokens as its JSON files say them."""
    eos = config.eos_ids
    return {
        "mask_token_id": config.mask_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_id,
    }


def family_named(name: str) -> Family:
    """One of FAMILIES, whose file is imported when it is first asked for."""
    family: Family = import_module(f"expertshare.models.{name}").FAMILY
    return family


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family that config.json names; ConfigError suggests the nearest where there is none."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(
            f"config.json: model_type must name a family, got {model_type!r}. Known: {', '.join(sorted(FAMILIES))}"
        )
    if model_type == "llada" and raw.get("num_experts", raw.get("num_local_experts")) is None:
        raise ConfigError(
            "config.json: model_type 'llada' without num_experts is the dense LLaDA, which has no experts to share: "
            "use a mixture-of-experts checkpoint such as LLaDA-MoE"
        )
    name = ALIASES.get(model_type, model_type)
    if name not in FAMILIES:
        raise ConfigError(
            f"config.json: unknown model_type {model_type!r}. {nearest(model_type, {*FAMILIES, *ALIASES})} "
            "docs/add-a-model.md says how to add one"
        )
    return family_named(name)


def gated_targets(name: str, entry: str, inner: int, expert: int | None = None) -> list[Target]:
    """A gated MLP of width `inner`: gate and up become one projection. name, entry: with {} where a projection's name
    belongs. expert: as in Target."""
    return [
        Target(name.format("gate"), entry.format("gate_up"), expert, (0, inner)),
        Target(name.format("up"), entry.format("gate_up"), expert, (inner, 2 * inner)),
        Target(name.format("down"), entry.format("down"), expert),
    ]


def expert_targets(config: ModelConfig, prefix: str, moe: str) -> list[Target]:
    """One tensor per expert and projection: `{prefix}.experts.E.gate_proj.weight` and so on."""
    return [
        target
        for e in range(config.router.num_experts)
        for target in gated_targets(
            f"{prefix}.experts.{e}.{{}}_proj.weight", f"{moe}.experts.{{}}", config.expert_hidden, e
        )
    ]


def head_targets(config: ModelConfig) -> list[Target]:
    """The output head, where it is not the embedding."""
    return [] if config.tie_embeddings else [Target("lm_head.weight", "head.weight")]


def qwen_targets(
    config: ModelConfig, experts: Callable[[ModelConfig, str, str], list[Target]] = expert_targets
) -> list[Target]:
    """Names of OLMoE and Qwen3-MoE: separate query, key and value projections, experts in every layer."""
    result = [Target("model.embed_tokens.weight", "embed.weight"), Target("model.norm.weight", "norm.weight")]
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index in range(config.num_layers):
        source, target = f"model.layers.{index}", f"layers.{index}"
        attention, qkv = f"{source}.self_attn", f"{target}.attention.qkv.weight"
        result += [
            Target(f"{source}.input_layernorm.weight", f"{target}.attention_norm.weight"),
            Target(f"{attention}.q_proj.weight", qkv, rows=(0, q)),
            Target(f"{attention}.k_proj.weight", qkv, rows=(q, q + kv)),
            Target(f"{attention}.v_proj.weight", qkv, rows=(q + kv, q + 2 * kv)),
            Target(f"{attention}.o_proj.weight", f"{target}.attention.out.weight"),
            Target(f"{attention}.q_norm.weight", f"{target}.attention.q_norm.weight"),
            Target(f"{attention}.k_norm.weight", f"{target}.attention.k_norm.weight"),
            Target(f"{source}.post_attention_layernorm.weight", f"{target}.mlp_norm.weight"),
            Target(f"{source}.mlp.gate.weight", f"{target}.moe.router.weight"),
            *experts(config, f"{source}.mlp", f"{target}.moe"),
        ]
    return result + head_targets(config)


def fused_targets(config: ModelConfig) -> list[Target]:
    """The same as transformers 5 holds it: a layer's experts in two tensors, gate_up_proj [E, 2F, D] and down_proj
    [E, D, F]."""

    def experts(config: ModelConfig, prefix: str, moe: str) -> list[Target]:
        del config
        names = {"gate_up_proj": "gate_up", "down_proj": "down"}
        return [Target(f"{prefix}.experts.{name}", f"{moe}.experts.{entry}") for name, entry in names.items()]

    return qwen_targets(config, experts)


PARTS = {"codes": "I8", "scales": "F32"}
"""The tensors that stand for one: its name in the file, with .codes and .scales, and their dtypes there."""


def is_vocabulary(target: Target) -> bool:
    """Whether a tensor is the embedding or the head."""
    return target.entry in ("embed.weight", "head.weight")


def quantised_targets(target: Target) -> list[Target]:
    """Where the parts of a quantised embedding or head lie; any other target as it is."""
    if not is_vocabulary(target):
        return [target]
    entry = target.entry.removesuffix("weight")
    return [Target(f"{target.name}.{part}", f"{entry}{part}") for part in PARTS]
