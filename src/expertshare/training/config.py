"""What a training run is made of. Everything here goes into its report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from expertshare.config import ModelConfig, RouterSpec
from expertshare.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Knobs of a run from scratch on the generated tasks.

    samples_per_step: problems per optimiser step. mixture: weight of each task. mask_ratio: range of the share of
    answer positions that are masked, drawn per block; full_mask_share: share of blocks that are masked wholly, as
    at the first step of decoding. fill_weight: loss weight of the end-of-text tokens behind the first one.
    balance_rate: step of the selection bias towards an even load (DeepSeek's rule without an auxiliary loss);
    balance_loss: weight of the auxiliary loss for the same end, for routers without such a bias.
    Learning rates are peaks; they warm up over `warmup_steps` and fall linearly to zero over the last
    `decay_share` of the run.
    """

    steps: int = 4_600
    samples_per_step: int = 96
    seed: int = 0
    matrix_lr: float = 0.02
    scalar_lr: float = 0.003
    weight_decay: float = 0.0
    warmup_steps: int = 100
    decay_share: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 1.0)
    full_mask_share: float = 0.15
    fill_weight: float = 0.2
    balance_rate: float = 0.001
    balance_loss: float = 0.01
    mixture: dict[str, float] = field(
        default_factory=lambda: {"arith": 1.5, "math": 1.5, "code": 1.0, "code_pro": 1.0, "choice": 1.5}
    )
    dtype: str = "bfloat16"
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "samples_per_step", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        low, high = self.mask_ratio
        if not 0.0 < low <= high <= 1.0:
            raise ConfigError(f"mask_ratio must be a range inside (0, 1], got {self.mask_ratio}")
        for name in ("matrix_lr", "scalar_lr"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("weight_decay", "balance_rate", "balance_loss"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        for name in ("decay_share", "full_mask_share", "fill_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        weights = self.mixture.values()
        if not all(0.0 <= weight < math.inf for weight in weights) or not sum(weights) > 0.0:
            raise ConfigError(f"mixture must weigh tasks by numbers of at least 0, one above 0, got {self.mixture}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"dtype must be bfloat16 or float32, got {self.dtype!r}")

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak learning rate at 0-based `step`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = (self.steps - step) / max(1.0, self.decay_share * self.steps)
        return min(warm, left, 1.0)


FAMILIES = ("llada2_moe", "llada_moe")
"""Layouts that can be trained from scratch."""


def reference_architecture(
    *,
    family: str = "llada2_moe",
    vocab_size: int,
    mask_id: int,
    eos_id: int,
    pad_id: int,
    hidden: int = 128,
    layers: int = 4,
    expert_hidden: int = 32,
    num_experts: int = 64,
) -> ModelConfig:
    """A family's layout at the size of the reference models, 8 experts per token.

    LLaDA2: a sigmoid router with 8 groups of which 4 are kept, one shared expert, the first layer dense, blocks that
    see what is before them. LLaDA-MoE: a softmax router whose weights are not renormalised, experts in every layer,
    full attention. Raises ConfigError for another family, or experts that do not make 8 groups of two or more.
    """
    if family not in FAMILIES:
        raise ConfigError(f"expected a family that can be trained ({', '.join(FAMILIES)}), got {family!r}")
    full = family == "llada_moe"
    grouped = RouterSpec(
        num_experts=num_experts,
        top_k=8,
        activation="sigmoid",
        renormalise=True,
        scaling=2.5,
        num_groups=8,
        kept_groups=4,
        has_bias=True,
    )
    plain = RouterSpec(num_experts=num_experts, top_k=8, activation="softmax", renormalise=False)
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // 32,
        num_kv_heads=max(1, hidden // 64),
        head_dim=32,
        rotary_dim=16,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        num_dense_layers=0 if full else 1,
        dense_hidden=0 if full else 3 * hidden,
        expert_hidden=expert_hidden,
        shared_hidden=0 if full else expert_hidden,
        router=plain if full else grouped,
        attention="full" if full else "block_causal",
        block_length=32,
        max_positions=1024,
        mask_id=mask_id,
        eos_ids=(eos_id,),
        pad_id=pad_id,
    )
