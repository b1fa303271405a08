"""What a distillation is made of. Everything here goes into its record; a resumed run must ask for the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from expertshare.errors import ConfigError

OptimiserName = Literal["adamw", "muon"]
DEFAULT_LR = {"adamw": 2e-3, "muon": 0.02}
"""Chosen on the reference model (3 M parameters). The published 2e-6 is for AdamW on a model of 16 G parameters."""
_SCALAR_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Knobs of a self-distillation.

    policy: what the model is trained for, as text. start_policy: the same policy with other numbers; they go evenly
    to those of `policy` over the first `curriculum_share` of the steps. router_only: train nothing but the weights of
    the routers. samples_per_step: answers per optimiser step, over all processes; micro_batch: how many of them one
    forward of one process takes. mask_ratio: range of the share of answer positions that are masked, drawn per
    sample; full_mask_share: share of samples that are masked wholly, as at the first step of decoding (not published).
    fill_weight: loss weight of the end-of-text tokens behind the first one, which fill the last block. lr: peak;
    with muon that of matrices, everything else being trained by AdamW at `scalar_lr`. It warms up over `warmup_steps`
    and falls along a half cosine to zero. None: the default for the optimiser.
    """

    policy: str
    start_policy: str | None = None
    curriculum_share: float = 0.5
    router_only: bool = False
    steps: int = 1_000
    samples_per_step: int = 96
    micro_batch: int = 32
    optimiser: OptimiserName = "adamw"
    lr: float | None = None
    scalar_lr: float | None = None
    weight_decay: float = 0.0
    warmup_steps: int = 20
    mask_ratio: tuple[float, float] = (0.3, 0.8)
    full_mask_share: float = 0.0
    fill_weight: float = 0.2
    dtype: str = "bfloat16"
    seed: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "samples_per_step", "micro_batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.optimiser not in get_args(OptimiserName):
            raise ConfigError(f"optimiser must be adamw or muon, got {self.optimiser!r}")
        for name in ("lr", "scalar_lr"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ConfigError(f"{name} must be a positive number, got {value}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be a number of at least 0, got {self.weight_decay}")
        low, high = self.mask_ratio
        if not 0.0 < low <= high <= 1.0:
            raise ConfigError(f"mask_ratio must be a range inside (0, 1], got {self.mask_ratio}")
        for name in ("full_mask_share", "fill_weight", "curriculum_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"dtype must be bfloat16 or float32, got {self.dtype!r}")

    @property
    def peak_lr(self) -> float:
        """Peak learning rate, of matrices where those have an optimiser of their own."""
        return DEFAULT_LR[self.optimiser] if self.lr is None else self.lr

    @property
    def peak_scalar_lr(self) -> float:
        """Peak learning rate of what muon does not train."""
        return _SCALAR_SHARE * self.peak_lr if self.scalar_lr is None else self.scalar_lr

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak learning rate at 0-based `step`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warm * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
