"""What decoding is asked for and what it returns: options; a block as soon as it is committed, a row, a generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from expertshare.config import ModelConfig
from expertshare.errors import InputError
from expertshare.measure.cost import Cost

Remasking = Literal["confidence", "random"]
FinishReason = Literal["eos", "length"]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character (yet)."""
_COUNTS = ("gen_length", "block_length", "steps_per_block", "minimal_top_k", "top_k", "max_post_steps", "seed")
_LEAST = {"max_post_steps": 0, "seed": 0}
"""Of these counts; of the others 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingOptions:
    """Knobs of decoding; `resolve` fills in the model's own values and refuses what cannot work.

    gen_length: tokens to generate for each prompt, at most. block_length: tokens decoded together (None: the
    model's). steps_per_block: denoising steps that a block is spread over (None: its length), in LLaDA2 never more than
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
        for name in _COUNTS:
            value, least = getattr(self, name), _LEAST.get(name, 1)
            if value is None and name in ("block_length", "steps_per_block", "top_k"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}. Change {name}.")
        for message, wrong in self._objections(config).items():
            if wrong:
                raise InputError(message)
        length = self.block_length or config.block_length
        steps = self.steps_per_block or length
        if config.shortens_steps:
            steps = min(steps, self.gen_length // self.minimal_top_k)
        return replace(self, block_length=length, steps_per_block=steps)

    def _objections(self, config: ModelConfig) -> dict[str, bool]:
        """What can be said against these options, and whether it holds."""
        full, random = config.attention == "full", self.remasking == "random"
        threshold, editing, top_p = self.threshold, self.editing_threshold, self.top_p
        length = self.block_length or config.block_length
        return {
            f"minimal_top_k must be at most gen_length ({self.gen_length}), got {self.minimal_top_k}. "
            "Lower it, or generate more tokens.": self.minimal_top_k > self.gen_length,
            f"seed must lie in 0..2**63 - 1, got {self.seed}. Use a smaller one.": self.seed >= 2**63,
            f"threshold must lie in [0, 1), got {threshold}. "
            "None commits a fixed number of tokens per step instead.": threshold is not None and not 0 <= threshold < 1,
            f"editing_threshold must lie in [0, 1), got {editing}. None turns editing off; "
            "0.0 edits wherever the model prefers another token.": editing is not None and not 0 <= editing < 1,
            f"top_p must lie in (0, 1], got {top_p}. None samples from the whole vocabulary.": (
                top_p is not None and not 0 < top_p <= 1
            ),
            f"temperature must be a finite number of at least 0, got {self.temperature}. 0 is argmax.": (
                not 0 <= self.temperature < math.inf
            ),
            f"remasking must be 'confidence' or 'random', got {self.remasking!r}. Choose one of them.": (
                self.remasking not in get_args(Remasking)
            ),
            f"editing needs a block-causal model, got {config.family} with full attention. "
            "Leave editing_threshold at None.": full and editing is not None,
            f"random remasking needs a full-attention model, got {config.family} (block-causal). "
            "Use remasking='confidence'.": random and not full,
            "random remasking commits a fixed number of tokens per step, "
            f"got threshold {threshold}. Set threshold to None.": random and threshold is not None,
            f"gen_length must be a multiple of the block length ({length}) for a full-attention model, "
            f"got {self.gen_length}. Use {math.ceil(self.gen_length / length) * length}, or another block_length.": (
                full and self.gen_length % length != 0
            ),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockResult:
    """A committed block. token_ids: what it adds to the answer: no prompt, nothing from the first end-of-text
    token on.

    row: index of the prompt. block: number among the row's decoded blocks, from 0. finish_reason: None unless
    this is the row's last block. steps: denoising forwards; forwards: those, the commit forward, and the
    prefill if this is the row's first block.
    """

    row: int
    block: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    steps: int
    forwards: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RowResult:
    """One prompt's answer and the forwards it took part in; `blocks` counts the decoded blocks.

    finish_reason: None where decoding was not run to the end.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    steps: int
    forwards: int
    blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The answers of a batch, what they cost in experts, and the seconds spent, in all and by part of the
    model.

    uncaptured_because: why its steps were not replays of a captured one, None where they were; the time of replays is
    no part's, and so counts as "other".
    """

    rows: tuple[RowResult, ...]
    cost: Cost
    elapsed_s: float
    seconds_by_part: Mapping[str, float]
    uncaptured_because: str | None = None


def join_blocks(blocks: list[BlockResult]) -> RowResult:
    """One row's result from its blocks, in order."""
    return RowResult(
        token_ids=tuple(token for block in blocks for token in block.token_ids),
        finish_reason=blocks[-1].finish_reason if blocks else None,
        steps=sum(block.steps for block in blocks),
        forwards=sum(block.forwards for block in blocks),
        blocks=len(blocks),
    )


@dataclass(slots=True)
class TextStream:
    """Turns tokens into text that never has to be taken back.

    A byte-level token may end inside a character; such an end is held back until the rest has come. So is a run of
    tokens that stand for one byte each, until another kind of token follows: one byte that fits nowhere makes the whole
    run unreadable. decode: token ids to text; it is given all ids so far, because what a token reads as can depend on
    those before it. byte_ids: the tokens of single bytes (`models.tokenizer.byte_ids`).
    """

    decode: Callable[[Sequence[int]], str]
    byte_ids: frozenset[int] = frozenset()
    _token_ids: list[int] = field(default_factory=list)
    _shown: str = ""

    def feed(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens add. With `last`, also what was held back."""
        self._token_ids.extend(token_ids)
        settled = len(self._token_ids)
        while not last and settled and self._token_ids[settled - 1] in self.byte_ids:
            settled -= 1
        text = self.decode(self._token_ids[:settled])
        ready = text if last else text.rstrip(REPLACEMENT)
        if not ready.startswith(self._shown):
            return ""
        fresh, self._shown = ready[len(self._shown) :], ready
        return fresh
