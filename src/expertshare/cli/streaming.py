"""Answers as they come: text from tokens, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from expertshare.decoding import BlockResult, TextStream


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
