"""The text of an answer while it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character (yet)."""


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
