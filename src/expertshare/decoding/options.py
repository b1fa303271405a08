"""How to decode: lengths, the rule by which tokens are committed, sampling, editing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from expertshare.config import ModelConfig
from expertshare.errors import InputError

Remasking = Literal["confidence", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingOptions:
    """Knobs of decoding; `resolve` fills in the model's own values and refuses what cannot work.

    gen_length: tokens to generate for each prompt, at most. block_length: tokens decoded together (None: the
    model's). steps_per_block: denoising steps that a block is spread over (None: its length), never more than
    gen_length // minimal_top_k. threshold: commit every token whose confidence is strictly greater, and at
    least the step's share (None: exactly the step's share). temperature: 0 is argmax. top_k, top_p: restrict
    sampling to the best tokens. filtered_confidence: take confidence from the restricted, tempered
    distribution instead of the model's own. seed: of every row that is not given its own. editing_threshold:
    replace committed tokens of the current block when another is more probable than this (LLaDA2.1); None is
    off, 0.0 is full editing. With editing, the least number of tokens per step is one, not the step's share.
    max_post_steps: forwards allowed on a block without masks. remasking: which tokens stay when a share is
    committed, the least confident or random ones (LLaDA-MoE). stop_at_eos: stop a row's work at its first
    end-of-text token; the answer is cut there either way.
    """

    gen_length: int = 128
    block_length: int | None = None
    steps_per_block: int | None = None
    minimal_top_k: int = 1
    threshold: float | None = 0.95
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    filtered_confidence: bool = False
    seed: int = 0
    editing_threshold: float | None = None
    max_post_steps: int = 16
    remasking: Remasking = "confidence"
    stop_at_eos: bool = True

    @property
    def takes_the_best(self) -> bool:
        """Whether all that is wanted of a position is its most probable token and the model's own probability."""
        restricted = self.top_k is not None or self.top_p is not None
        return self.temperature == 0.0 and not (self.filtered_confidence and restricted)

    def resolve(self, config: ModelConfig) -> DecodingOptions:
        """The same options with block_length and steps_per_block concrete for this model.

        Raises InputError for a value that is out of range or that this model's kind of decoding does not
        have.
        """
        self._check_counts()
        self._check_shares()
        self._check_for_model(config)
        length = self.block_length or config.block_length
        steps = min(self.steps_per_block or length, self.gen_length // self.minimal_top_k)
        resolved = replace(self, block_length=length, steps_per_block=steps)
        if config.attention == "full" and self.gen_length % length:
            whole = math.ceil(self.gen_length / length) * length
            raise InputError(
                f"gen_length must be a multiple of the block length ({length}) for a full-attention model, "
                f"got {self.gen_length}. Use {whole}, or another block_length."
            )
        return resolved

    def _check_counts(self) -> None:
        for name, least in (
            ("gen_length", 1),
            ("block_length", 1),
            ("steps_per_block", 1),
            ("minimal_top_k", 1),
            ("top_k", 1),
            ("max_post_steps", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is None and name in ("block_length", "steps_per_block", "top_k"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}. Change {name}.")
        if self.minimal_top_k > self.gen_length:
            raise InputError(
                f"minimal_top_k must be at most gen_length ({self.gen_length}), got {self.minimal_top_k}. "
                "Lower it, or generate more tokens."
            )
        if self.seed >= 2**63:
            raise InputError(f"seed must lie in 0..2**63 - 1, got {self.seed}. Use a smaller one.")

    def _check_shares(self) -> None:
        if self.threshold is not None and not 0.0 <= self.threshold < 1.0:
            raise InputError(
                f"threshold must lie in [0, 1), got {self.threshold}. "
                "None commits a fixed number of tokens per step instead."
            )
        if self.editing_threshold is not None and not 0.0 <= self.editing_threshold < 1.0:
            raise InputError(
                f"editing_threshold must lie in [0, 1), got {self.editing_threshold}. "
                "None turns editing off; 0.0 edits wherever the model prefers another token."
            )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must lie in (0, 1], got {self.top_p}. None samples from the whole vocabulary.")
        if not 0.0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be a finite number of at least 0, got {self.temperature}. 0 is argmax.")

    def _check_for_model(self, config: ModelConfig) -> None:
        if self.remasking not in get_args(Remasking):
            raise InputError(f"remasking must be 'confidence' or 'random', got {self.remasking!r}. Choose one of them.")
        full = config.attention == "full"
        if full and self.editing_threshold is not None:
            raise InputError(
                f"editing needs a block-causal model, got {config.family} with full attention. "
                "Leave editing_threshold at None."
            )
        if self.remasking == "random" and not full:
            raise InputError(
                f"random remasking needs a full-attention model, got {config.family} (block-causal). "
                "Use remasking='confidence'."
            )
        if self.remasking == "random" and self.threshold is not None:
            raise InputError(
                "random remasking commits a fixed number of tokens per step, "
                f"got threshold {self.threshold}. Set threshold to None."
            )
