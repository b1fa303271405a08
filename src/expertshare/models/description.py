"""Facts about a loaded model, for `expertshare info` and for reports."""

from __future__ import annotations

from dataclasses import dataclass

from expertshare.config import ModelConfig, RouterSpec
from expertshare.models.checkpoint import read_optional_json
from expertshare.models.layers import QuantisedVocabulary
from expertshare.models.loading import LoadedModel
from expertshare.routing import default_budget


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a user wants to know before choosing a policy. Sizes in bytes as loaded; coresets in experts.

    distilled_policy: the policy that `expertshare distill` trained the model for, as text; None for other models.
    """

    family: str
    architecture: str
    router_rule: str
    dtype: str
    num_parameters: int
    total_bytes: int
    bytes_per_expert: int
    experts_bytes: int
    experts_share: float
    min_coreset_inside: int
    min_coreset_ignore: int
    default_budget: int
    block_length: int
    max_positions: int
    expert_capacity: int | None
    distilled_policy: str | None


def describe(loaded: LoadedModel) -> ModelFacts:
    """Count parameters and bytes, put the router's rule in words, derive the smallest coresets."""
    config, spec = loaded.config, loaded.config.router
    tensors = {*loaded.model.parameters(), *loaded.model.buffers()}
    own_bytes = sum(t.numel() * t.element_size() for t in tensors)
    codes = (m.num_rows * m.weight.depth for m in loaded.model.modules() if isinstance(m, QuantisedVocabulary))
    own_parameters = sum(p.numel() for p in loaded.model.parameters()) + sum(codes)
    num_experts, layout = config.num_moe_layers * spec.num_experts, loaded.layout
    per_expert = layout.format.expert_bytes if layout else config.num_expert_parameters * loaded.model.dtype.itemsize
    experts = num_experts * per_expert
    elsewhere = num_experts if layout else 0
    total = own_bytes + elsewhere * per_expert
    return ModelFacts(
        family=config.family,
        architecture=_architecture(config),
        router_rule=router_rule(spec),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        num_parameters=own_parameters + elsewhere * config.num_expert_parameters,
        total_bytes=total,
        bytes_per_expert=per_expert,
        experts_bytes=experts,
        experts_share=experts / total,
        min_coreset_inside=spec.min_coreset_size("inside"),
        min_coreset_ignore=spec.min_coreset_size("ignore"),
        default_budget=default_budget(spec, "inside"),
        block_length=config.block_length,
        max_positions=config.max_positions,
        expert_capacity=config.expert_capacity,
        distilled_policy=read_optional_json(loaded.path / "distillation.json").get("policy"),
    )


def router_rule(spec: RouterSpec) -> str:
    """The model's own routing in one line of words."""
    parts = ["softmax over all experts" if spec.activation == "softmax" else "sigmoid per expert"]
    if spec.has_bias:
        parts.append("balancing bias for selection only")
    if spec.kept_groups < spec.num_groups:
        parts.append(f"best {spec.kept_groups} of {spec.num_groups} groups")
    parts.append(f"top {spec.top_k} of {spec.num_experts}")
    parts.append("weights renormalised" if spec.renormalise else "weights not renormalised")
    if spec.scaling != 1.0:
        parts.append(f"times {spec.scaling:g}")
    if spec.has_expert_scale:
        parts.append("times a scale per expert")
    return ", ".join(parts)


def _architecture(config: ModelConfig) -> str:
    dense = f", the first {config.num_dense_layers} dense" if config.num_dense_layers else ""
    shared = f", shared expert of width {config.shared_hidden}" if config.shared_hidden else ""
    attention = "full" if config.attention == "full" else "block-causal"
    return (
        f"{config.num_layers} layers{dense}, hidden {config.hidden_size}, {config.num_heads} query and "
        f"{config.num_kv_heads} key/value heads of {config.head_dim}, {attention} attention, "
        f"{config.router.num_experts} experts of width {config.expert_hidden} per layer{shared}, "
        f"vocabulary {config.vocab_size}"
    )
