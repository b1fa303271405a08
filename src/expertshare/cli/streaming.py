"""Answers as they come: text from tokens, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from expertshare.decoding import BlockResult

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


@dataclass(slots=True)
class AnswerPrinter:
    """Writes answers in the order of their prompts, each under a heading if there are several.

    The first unfinished answer is written as it comes. Those behind it, decoded in the same batch, wait.
    """

    prompts: Sequence[str]
    decode: Callable[[Sequence[int]], str]
    write: Callable[[str], None]
    _streams: dict[int, TextStream] = field(default_factory=dict)
    _waiting: dict[int, list[str]] = field(default_factory=dict)
    _finished: set[int] = field(default_factory=set)
    _row: int = -1

    def hear(self, block: BlockResult) -> None:
        """Take the next block of any answer."""
        last = block.finish_reason is not None
        stream = self._streams.setdefault(block.row, TextStream(self.decode))
        text = stream.feed(block.token_ids, last=last)
        self._waiting.setdefault(block.row, []).append(text)
        if last:
            self._finished.add(block.row)
        if self._row < 0:
            self._open(0)
        self._write_ready()

    def _write_ready(self) -> None:
        while self._row < len(self.prompts):
            self.write("".join(self._waiting.pop(self._row, [])))
            if self._row not in self._finished:
                return
            self.write("\n")
            self._open(self._row + 1)

    def _open(self, row: int) -> None:
        self._row = row
        if len(self.prompts) > 1 and row < len(self.prompts):
            first_line = self.prompts[row].strip().splitlines()[0]
            shown = first_line if len(first_line) <= 70 else first_line[:69] + "…"
            self.write(f"{'' if row == 0 else chr(10)}[{row + 1}/{len(self.prompts)}] {shown}\n")
