"""The state of one row of a batch. Rows share forwards and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expertshare.decoding.geometry import RowGeometry
from expertshare.decoding.options import DecodingOptions
from expertshare.measure.cost import ForwardKind, Turn


@dataclass(frozen=True, slots=True)
class StepState:
    """What a step came to in a row's block. finite: all that was proposed; has_masks: some of it is still undecided;
    changed: some of it was written; eos: the answer surely ends in it."""

    finite: bool
    has_masks: bool
    changed: bool
    eos: bool


@dataclass(slots=True, kw_only=True)
class Row:
    """Where a row is: its current block (an index on its canvas) and what happened in that block so far.

    number: which row it is, among all that the batch ever had; index: its place on the canvas, which another row may
    have had before it. options: its own, resolved; schedule: least number of tokens to write at each step of a block.
    steps: denoising forwards; post_steps: those that began without a mask; forwards: those plus prefill and
    commit. has_masks: some of the block is still undecided. ended: the answer already holds an end-of-text
    token.
    """

    number: int
    index: int
    geometry: RowGeometry
    options: DecodingOptions
    schedule: tuple[int, ...]
    generator: torch.Generator
    block: int
    steps: int = 0
    post_steps: int = 0
    forwards: int = 0
    has_masks: bool = True
    ended: bool = False

    @property
    def start(self) -> int:
        """Canvas index at which the current block starts."""
        return self.block * self.geometry.block_length

    @property
    def answer_block(self) -> int:
        """The current block's number among the decoded ones, from 0."""
        return self.block - self.geometry.first_block

    @property
    def on_last_block(self) -> bool:
        """Whether nothing comes after the current block."""
        return self.block == self.geometry.num_blocks - 1

    @property
    def least_tokens(self) -> int:
        """Fewest tokens to write in the next step."""
        if self.options.editing_threshold is not None and self.options.threshold is not None:
            return 1
        return self.schedule[min(self.steps, len(self.schedule) - 1)]

    def turn(self, kind: ForwardKind) -> Turn:
        """This row's part in a forward of that kind, for the ledger."""
        return Turn(
            row=self.number,
            block=None if kind == "prefill" else self.answer_block,
            step=self.steps if kind == "denoise" else None,
        )

    def enter_next_block(self) -> None:
        """Begin the block after this one."""
        self.block += 1
        self.steps = self.post_steps = self.forwards = 0
        self.has_masks = True
