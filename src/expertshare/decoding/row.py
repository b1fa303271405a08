"""The state of one row of a batch, and the current blocks of several. Rows share forwards and nothing else.

R rows, L positions of a block, C positions of a row's canvas: its padding, prompt and answer, in whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.decoding.commit_rules import CommitRule, rule_of
from expertshare.decoding.options import DecodingOptions
from expertshare.errors import InputError
from expertshare.measure.cost import ForwardKind, Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGeometry:
    """One row's canvas: `padding` dead positions, the prompt, then the answer, in whole blocks.

    Block-causal models have no padding: blocks are aligned to absolute position 0, so the first decoded one
    may hold the end of the prompt, and the last one may reach past the answer. Full-attention models decode
    in blocks that start at the prompt's end; padding in front of the prompt makes those the sharing groups of
    experts too.
    """

    prompt_length: int
    gen_length: int
    block_length: int
    padding: int

    @property
    def answer_start(self) -> int:
        """First canvas index of the answer."""
        return self.padding + self.prompt_length

    @property
    def answer_end(self) -> int:
        """First canvas index after the answer."""
        return self.answer_start + self.gen_length

    @property
    def first_block(self) -> int:
        """The first block to decode; those before it hold nothing but prompt."""
        return self.answer_start // self.block_length

    @property
    def num_blocks(self) -> int:
        """Blocks on the canvas, the last one whole."""
        return -(-self.answer_end // self.block_length)

    @property
    def canvas_length(self) -> int:
        """Positions on the canvas: whole blocks."""
        return self.num_blocks * self.block_length


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """One row: its canvas, its current block (an index on the canvas) and what happened in that block so far.

    number: which row it is, among all that the batch ever had. options: its own, resolved; rule: which proposals are
    written, by those options. tokens_C: int64, the mask id where undecided; masked_C: bool, undecided (a mask id that
    stands in a prompt is text). coresets: those that its last denoising step used, per MoE layer, bool [groups, E],
    where some layer's policy reuses them. steps: denoising forwards; post_steps: those that began without a mask;
    forwards: those plus prefill and commit. has_masks: some of the block is still undecided. ended: the answer already
    holds an end-of-text token.
    """

    number: int
    geometry: RowGeometry
    options: DecodingOptions
    rule: CommitRule
    generator: torch.Generator
    tokens_C: Tensor
    masked_C: Tensor
    block: int
    coresets: tuple[Tensor, ...] = ()
    steps: int = 0
    post_steps: int = 0
    forwards: int = 0
    has_masks: bool = True
    ended: bool = False

    @classmethod
    def of(
        cls,
        number: int,
        prompt: Sequence[int],
        options: DecodingOptions,
        config: ModelConfig,
        *,
        seed: int,
        device: torch.device,
    ) -> Row:
        """A row before its first block: the prompt in place, masks behind it; `options` resolved."""
        assert options.block_length is not None
        geometry = RowGeometry(
            prompt_length=len(prompt),
            gen_length=options.gen_length,
            block_length=options.block_length,
            padding=-len(prompt) % options.block_length if config.attention == "full" else 0,
        )
        tokens_C = torch.full((geometry.canvas_length,), config.mask_id)
        tokens_C[geometry.padding : geometry.answer_start] = torch.tensor(list(prompt))
        return cls(
            number=number,
            geometry=geometry,
            options=options,
            rule=rule_of(options),
            generator=torch.Generator(device).manual_seed(seed),
            tokens_C=tokens_C.to(device),
            masked_C=torch.arange(geometry.canvas_length, device=device) >= geometry.answer_start,
            block=geometry.first_block,
        )

    @property
    def start(self) -> int:
        """Canvas index at which the current block starts."""
        return self.block * self.geometry.block_length

    @property
    def end(self) -> int:
        """Canvas index behind the current block."""
        return self.start + self.geometry.block_length

    @property
    def answer_block(self) -> int:
        """The current block's number among the decoded ones, from 0."""
        return self.block - self.geometry.first_block

    @property
    def answer_span(self) -> slice:
        """Which of the current block's positions belong to the answer."""
        return slice(max(0, self.geometry.answer_start - self.start), self.geometry.answer_end - self.start)

    @property
    def on_last_block(self) -> bool:
        """Whether nothing comes after the current block."""
        return self.block == self.geometry.num_blocks - 1

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


@dataclass(frozen=True, slots=True)
class Window:
    """The current blocks of R rows. index_RL: where they are on each row's canvas.

    tokens_RL: int64, the mask id where undecided. masked_RL: still undecided. frozen_RL: prompt. answer_RL: inside the
    answer that will be returned.
    """

    index_RL: Tensor
    tokens_RL: Tensor
    masked_RL: Tensor
    frozen_RL: Tensor
    answer_RL: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Window:
        """The blocks as they are now, in memory of their own."""
        tokens_RL = torch.stack([row.tokens_C[row.start : row.end] for row in rows])
        masked_RL = torch.stack([row.masked_C[row.start : row.end] for row in rows])
        bounds = [(row.start, row.geometry.answer_start, row.geometry.answer_end) for row in rows]
        start_R, first_R, end_R = torch.tensor(bounds, device=tokens_RL.device).unbind(dim=1)
        index_RL = start_R.unsqueeze(1) + torch.arange(tokens_RL.shape[1], device=tokens_RL.device)
        frozen_RL = index_RL < first_R.unsqueeze(1)
        return cls(index_RL, tokens_RL, masked_RL, frozen_RL, ~frozen_RL & (index_RL < end_R.unsqueeze(1)))

    def write(self, rows: Sequence[Row], proposed_RL: Tensor, write_RL: Tensor) -> Window:
        """Put the proposed tokens into their rows where `write_RL`; those positions are decided from now on. Returns
        the blocks as they are then."""
        tokens_RL = torch.where(write_RL, proposed_RL, self.tokens_RL)
        masked_RL = self.masked_RL & ~write_RL
        for row, tokens_L, masked_L in zip(rows, tokens_RL, masked_RL, strict=True):
            row.tokens_C[row.start : row.end] = tokens_L
            row.masked_C[row.start : row.end] = masked_L
        return replace(self, tokens_RL=tokens_RL, masked_RL=masked_RL)


def check_prompts(prompts: Sequence[Sequence[int]], options: DecodingOptions, config: ModelConfig) -> None:
    """Raise InputError for no prompt, an empty one, one too long for the model, or an id outside the
    vocabulary."""
    if not prompts:
        raise InputError("expected at least one prompt, got none. Pass a list of token-id lists.")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {row + 1} is empty: expected one token at least. Remove it, or give it text.")
        total = len(prompt) + options.gen_length
        if total > config.max_positions:
            raise InputError(
                f"prompt {row + 1} has {len(prompt)} tokens; with gen_length {options.gen_length} that is "
                f"{total}, and the model has {config.max_positions} positions. Shorten the prompt, or generate less."
            )
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise InputError(
                    f"prompt {row + 1} holds token id {token}, expected ids in 0..{config.vocab_size - 1}. "
                    "Encode it with the tokenizer of this model."
                )
