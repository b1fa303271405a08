"""What a training run is made of. Everything here goes into its record; a resumed run must ask for the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

from expertshare.config import ModelConfig, RouterSpec
from expertshare.errors import ConfigError, PolicyError
from expertshare.routing import RoutingPolicy, knobs, parse_policy

OptimiserName = Literal["adamw", "muon"]
ElasticSets = Literal["random", "votes"]
DEFAULT_LR = {"adamw": 2e-3, "muon": 0.02}
"""Of `distill`, chosen on the reference model (3 M parameters). The published 2e-6 is for AdamW on a model of 16 G
parameters."""
_SCALAR_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What every training run has.

    samples_per_step: problems or answers per optimiser step, over all processes. mask_ratio: range of the share of
    answer positions that are masked; full_mask_share: share of what is masked wholly, as at the first step of decoding.
    fill_weight: loss weight of the end-of-text tokens behind the first one, which fill the last block. Learning rates
    are peaks; they warm up over `warmup_steps`. elastic: smallest number of experts that a sharing group draws (None:
    groups are routed by the policy); elastic_free: share of groups that use all experts; elastic_sets: whether sets are
    drawn evenly or by the group's votes.
    """

    RATES: ClassVar[str] = "lr"
    """The learning rates by name, for errors."""
    ONE_RATIO: ClassVar[bool] = False
    """Whether a mask ratio is drawn for every sample, and not for every block."""

    steps: int
    samples_per_step: int = 96
    seed: int = 0
    weight_decay: float = 0.0
    warmup_steps: int
    mask_ratio: tuple[float, float]
    full_mask_share: float = 0.0
    fill_weight: float = 0.2
    dtype: str = "bfloat16"
    checkpoint_every: int
    micro_batch: int = 96
    elastic: int | None = None
    elastic_free: float = 0.25
    elastic_sets: ElasticSets = "random"

    def __post_init__(self) -> None:
        for name in ("steps", "samples_per_step", "checkpoint_every", "micro_batch"):
            self.check(name, getattr(self, name) >= 1, "be at least 1")
        low, high = self.mask_ratio
        self.check("mask_ratio", 0.0 < low <= high <= 1.0, "be a range inside (0, 1]")
        self.check("weight_decay", 0.0 <= self.weight_decay < math.inf, "be a number of at least 0")
        for name in ("full_mask_share", "fill_weight", "elastic_free"):
            self.check(name, 0.0 <= getattr(self, name) <= 1.0, "lie in [0, 1]")
        unread = self.elastic is None and (self.elastic_free, self.elastic_sets) != (0.25, "random")
        self.check("elastic", not unread, "be given for elastic_free and elastic_sets to mean anything")
        self.check("elastic_sets", self.elastic_sets in get_args(ElasticSets), "be random or votes")
        self.check("dtype", self.dtype in ("bfloat16", "float32"), "be bfloat16 or float32")

    def check(self, name: str, holds: bool, must: str) -> None:
        """Raise ConfigError about a field unless what must be true of it holds."""
        if not holds:
            raise ConfigError(f"{name} must {must}, got {getattr(self, name)!r}")

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak learning rate at 0-based `step`."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(RunConfig):
    """A run on generated problems. A mask ratio is drawn for every block.

    mixture: weight of each task. balance_rate: step of the selection bias towards an even load (DeepSeek's rule without
    an auxiliary loss); balance_loss: weight of the auxiliary loss for the same end, for routers without such a bias.
    Learning rates fall linearly to zero over the last `decay_share` of the run.
    """

    RATES: ClassVar[str] = "matrix_lr or scalar_lr"

    steps: int = 4_600
    warmup_steps: int = 100
    mask_ratio: tuple[float, float] = (0.1, 1.0)
    full_mask_share: float = 0.15
    checkpoint_every: int = 500
    matrix_lr: float = 0.02
    scalar_lr: float = 0.003
    decay_share: float = 0.5
    balance_rate: float = 0.001
    balance_loss: float = 0.01
    mixture: dict[str, float] = field(
        default_factory=lambda: {"arith": 1.5, "math": 1.5, "code": 1.0, "code_pro": 1.0, "choice": 1.5}
    )

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        for name in ("matrix_lr", "scalar_lr"):
            self.check(name, 0.0 < getattr(self, name) < math.inf, "be a positive number")
        for name in ("balance_rate", "balance_loss"):
            self.check(name, 0.0 <= getattr(self, name) < math.inf, "be a number of at least 0")
        self.check("decay_share", 0.0 <= self.decay_share <= 1.0, "lie in [0, 1]")
        weights = self.mixture.values()
        usable = all(0.0 <= weight < math.inf for weight in weights) and sum(weights) > 0.0
        self.check("mixture", usable, "weigh tasks by numbers of at least 0, one above 0")

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak learning rate at 0-based `step`."""
        left = (self.steps - step) / max(1.0, self.decay_share * self.steps)
        return min(RunConfig.learning_rate_factor(self, step), left)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(RunConfig):
    """A self-distillation. A mask ratio is drawn for every sample.

    policy: what the model is trained for, as text; vanilla with `elastic`, which stands in its place. start_policy: the
    same policy with other numbers; they go evenly to those of `policy` over the first `curriculum_share` of the steps.
    router_only: train nothing but the weights of the routers. full_mask_share is not published. lr: peak; with muon
    that of matrices, everything else being trained by AdamW at `scalar_lr`; None: the default for the optimiser. It
    falls along a half cosine to zero.
    """

    ONE_RATIO: ClassVar[bool] = True

    policy: str = "vanilla"
    start_policy: str | None = None
    curriculum_share: float = 0.5
    router_only: bool = False
    steps: int = 1_000
    warmup_steps: int = 20
    mask_ratio: tuple[float, float] = (0.3, 0.8)
    checkpoint_every: int = 200
    micro_batch: int = 32
    optimiser: OptimiserName = "adamw"
    lr: float | None = None
    scalar_lr: float | None = None

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        alone = self.policy == "vanilla" and self.start_policy is None
        self.check("policy", self.elastic is None or alone, "be left out of elastic training, which draws coresets")
        self.check("optimiser", self.optimiser in get_args(OptimiserName), "be adamw or muon")
        for name in ("lr", "scalar_lr"):
            value = getattr(self, name)
            self.check(name, value is None or 0.0 < value < math.inf, "be a positive number")
        self.check("curriculum_share", 0.0 <= self.curriculum_share <= 1.0, "lie in [0, 1]")

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
        return RunConfig.learning_rate_factor(self, step) * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True, kw_only=True, slots=True)
class Curriculum:
    """The policy of every step: the numbers of `start` go evenly to those of `target` in `steps` steps.

    Both are bound to the model's router, so that all numbers are concrete.
    """

    start: RoutingPolicy
    target: RoutingPolicy
    steps: int
    spec: RouterSpec

    def policy(self, step: int) -> RoutingPolicy:
        """The bound policy of 0-based `step`; from `steps` on, the target itself."""
        if step >= self.steps:
            return self.target
        share = step / self.steps
        between = {name: type(low)(round(low + share * (high - low), 9)) for name, (low, high) in self.moving().items()}
        return replace(self.target, **between).bind(self.spec)

    def moving(self) -> dict[str, tuple[float, float]]:
        """First and last value of every knob in which the two differ."""
        start, target = knobs(self.start), knobs(self.target)
        return {name: (start[name], last) for name, last in target.items() if start[name] != last}


def make_curriculum(config: DistillConfig, spec: RouterSpec) -> Curriculum:
    """The curriculum that a configuration asks for; without a start policy, the target at every step.

    Raises PolicyError for a policy that the router cannot work with, or a start that is another policy or differs in
    more than numbers.
    """
    target = parse_policy(config.policy).bind(spec)
    if config.start_policy is None:
        return Curriculum(start=target, target=target, steps=0, spec=spec)
    start = parse_policy(config.start_policy).bind(spec)
    if start.name != target.name:
        raise PolicyError(
            f"the start policy must be {target.name} with other numbers, got {start.name}: only knobs can move"
        )
    steps = round(config.curriculum_share * config.steps)
    curriculum = Curriculum(start=start, target=target, steps=steps, spec=spec)
    for name, pair in curriculum.moving().items():
        if not all(isinstance(value, int | float) for value in pair):
            raise PolicyError(f"{name} must be the same word in both policies, got {pair[0]!r} and {pair[1]!r}")
        if type(pair[0]) is not type(pair[1]):
            raise PolicyError(f"{name} must be a count or a fraction in both policies, got {pair[0]} and {pair[1]}")
    return curriculum


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
    plain = RouterSpec(num_experts=num_experts, top_k=8, activation="softmax", renormalise=False)
    grouped = replace(
        plain, activation="sigmoid", renormalise=True, scaling=2.5, num_groups=8, kept_groups=4, has_bias=True
    )
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
