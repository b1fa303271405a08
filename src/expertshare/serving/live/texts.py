"""Single tokens as text, for cells that show one each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenTexts:
    """What each token reads as by itself, remembered.

    Some tokenizers swallow the blank in front of a first token; so each is read behind another one, and what that one
    reads as is cut off. Bytes that are no character by themselves read as the replacement character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before = list(tokenizer("x", add_special_tokens=False)["input_ids"])
        self._prefix = self._decode([])
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode([token]).removeprefix(self._prefix)
        return self._known[token]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode([*self._before, *tokens], skip_special_tokens=False))
