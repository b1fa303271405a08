"""Where prompt, answer and blocks of one row lie on its canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertshare.config import ModelConfig
from expertshare.decoding.options import DecodingOptions
from expertshare.errors import InputError


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
        """Blocks on the canvas."""
        return -(-self.answer_end // self.block_length)

    @property
    def canvas_length(self) -> int:
        """Positions on the canvas: whole blocks."""
        return self.num_blocks * self.block_length

    def answer_span(self, block: int) -> tuple[int, int]:
        """Canvas indices [start, end) of what block `block` adds to the answer."""
        start = block * self.block_length
        return max(start, self.answer_start), min(start + self.block_length, self.answer_end)


def lay_out(prompt_length: int, options: DecodingOptions, config: ModelConfig) -> RowGeometry:
    """The geometry of a row; `options` resolved."""
    assert options.block_length is not None
    padding = -prompt_length % options.block_length if config.attention == "full" else 0
    return RowGeometry(
        prompt_length=prompt_length,
        gen_length=options.gen_length,
        block_length=options.block_length,
        padding=padding,
    )


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
