"""What to tune for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from expertshare.errors import InputError

CostKind = Literal["experts", "bytes", "latency"]
Quality = Literal["auto", "accuracy", "agreement"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningOptions:
    """The promise, and how much work to spend on it.

    retain: share of vanilla's accuracy (or of answers equal to vanilla's) that must be kept; confidence: of this
    promise. cost: what to make small: unique experts per block and layer, expert bytes per prompt, or measured seconds
    per block. quality: "accuracy" needs prompts with references or tests, "agreement" none; "auto" is accuracy where
    all prompts can be judged, agreement where none can. policies: names to choose from (None: all with a knob to tune).
    trials: proposals of the search. recorded_prompts: prompts whose denoising steps the search replays. search_share:
    share of the prompts that the search may see; the others certify. seed: of split and search.
    """

    retain: float = 0.99
    confidence: float = 0.95
    cost: CostKind = "experts"
    quality: Quality = "auto"
    policies: tuple[str, ...] | None = None
    trials: int = 100
    recorded_prompts: int = 64
    search_share: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for a value that is out of range."""
        for name, value, low in (
            ("retain", self.retain, 0.0),
            ("confidence", self.confidence, 0.5),
            ("search_share", self.search_share, 0.0),
        ):
            if not low < value < 1.0:
                raise InputError(f"{name} must lie between {low:g} and 1, both left out, got {value}")
        for name, count, least in (
            ("trials", self.trials, 0),
            ("recorded_prompts", self.recorded_prompts, 1),
            ("seed", self.seed, 0),
        ):
            if count < least:
                raise InputError(f"{name} must be at least {least}, got {count}")
        for name, word, known in (
            ("cost", self.cost, get_args(CostKind)),
            ("quality", self.quality, get_args(Quality)),
        ):
            if word not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {word!r}")
