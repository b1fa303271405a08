"""What a checkpoint says of its model, in one vocabulary for every family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expertshare.errors import ConfigError

GroupLimit = Literal["inside", "ignore"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """The model's own routing rule: how scores become K experts and weights for each token.

    activation: "softmax" over all experts or independent "sigmoid" per expert, in float32.
    renormalise: whether the K weights are divided by their sum. scaling: factor on the final weights.
    num_groups / kept_groups: group-limited routing (LLaDA2): experts are split into `num_groups` equal groups,
    a group scores the sum of its two best experts, and a token chooses inside its `kept_groups` best groups.
    has_bias: a balancing bias is added to the affinity for selection only. has_expert_scale: DiffusionGemma's
    learned factor per expert on the final weight.
    """

    num_experts: int
    top_k: int
    activation: Literal["softmax", "sigmoid"]
    renormalise: bool
    scaling: float = 1.0
    num_groups: int = 1
    kept_groups: int = 1
    has_bias: bool = False
    has_expert_scale: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.top_k > self.num_experts:
            raise ConfigError(
                f"experts per token must lie in 1..{self.num_experts} (the number of experts), got {self.top_k}"
            )
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ConfigError(
                f"the number of expert groups must divide {self.num_experts} experts, got {self.num_groups}"
            )
        if not 1 <= self.kept_groups <= self.num_groups:
            raise ConfigError(f"kept groups must lie in 1..{self.num_groups}, got {self.kept_groups}")
        if self.kept_groups * self.group_size < self.top_k:
            raise ConfigError(
                f"{self.kept_groups} kept groups of {self.group_size} experts cannot give {self.top_k} experts"
            )

    @property
    def group_size(self) -> int:
        """Number of experts in one group."""
        return self.num_experts // self.num_groups

    def min_coreset_size(self, group_limit: GroupLimit) -> int:
        """Fewest shared experts that leave every token `top_k` choices inside any coreset of that size.

        Without a group limit it is K. With it, a token may lose the experts of num_groups - kept_groups groups.
        If 2 * kept_groups >= K, groups worth losing K choices over hold one expert each (a group with two or more
        outranks them), so the loss is at most one expert per dropped group: K + num_groups - kept_groups, which is
        12 for LLaDA2.0-mini. Otherwise the dropped groups may be full ones. Groups of one expert lose nothing: a group
        with its expert outranks an empty one, and the kept groups are at least K.
        """
        if group_limit == "ignore" or self.kept_groups == self.num_groups or self.group_size == 1:
            return self.top_k
        dropped = self.num_groups - self.kept_groups
        lost_per_group = 1 if 2 * self.kept_groups >= self.top_k else self.group_size
        return min(self.num_experts, self.top_k + dropped * lost_per_group)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture of an MoE diffusion language model. Sizes are counts of features; ids index the vocabulary.

    attention: "block_causal" (a token sees its own block and all before it) or "full".
    num_dense_layers: leading layers with a dense MLP instead of experts. shared_hidden: width of the expert that
    every token uses (0: none). expert_capacity: coreset size that the model was trained with (LLaDA2.2), or None.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rms_norm_eps: float
    num_dense_layers: int
    dense_hidden: int
    expert_hidden: int
    shared_hidden: int
    router: RouterSpec
    attention: Literal["block_causal", "full"]
    block_length: int
    max_positions: int
    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    tie_embeddings: bool = False
    expert_capacity: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"attention heads must be a multiple of key/value heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ConfigError(f"rotary dimensions must be even and in 2..{self.head_dim}, got {self.rotary_dim}")
        for name, token in (("mask", self.mask_id), ("pad", self.pad_id), *(("eos", e) for e in self.eos_ids)):
            if not 0 <= token < self.vocab_size:
                raise ConfigError(f"{name} id must lie in 0..{self.vocab_size - 1} (the vocabulary), got {token}")
        if self.block_length < 1:
            raise ConfigError(f"block length must be at least 1, got {self.block_length}")

    @property
    def shortens_steps(self) -> bool:
        """Whether an answer of few tokens has fewer steps a block, as in LLaDA2's own `generate`. In other families a
        step writes its share of the block whatever the length."""
        return self.family == "llada2_moe"

    @property
    def num_moe_layers(self) -> int:
        """Layers that route to experts."""
        return self.num_layers - self.num_dense_layers

    @property
    def num_expert_parameters(self) -> int:
        """Weights of one expert: gate, up and down projection."""
        return 3 * self.hidden_size * self.expert_hidden
