"""What decoding returns: a block as soon as it is committed, a row, a whole generation; and an answer's text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from expertshare.measure.cost import Cost

FinishReason = Literal["eos", "length"]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character (yet)."""


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

    A byte-level token may end inside a character; such an end is held back until the rest has come. decode: token ids
    to text; it is given all ids so far, because what a token reads as can depend on those before it.
    """

    decode: Callable[[Sequence[int]], str]
    _token_ids: list[int] = field(default_factory=list)
    _shown: str = ""

    def feed(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens add. With `last`, also what was held back."""
        self._token_ids.extend(token_ids)
        text = self.decode(self._token_ids)
        ready = text if last else text.rstrip(REPLACEMENT)
        if not ready.startswith(self._shown):
            return ""
        fresh, self._shown = ready[len(self._shown) :], ready
        return fresh
