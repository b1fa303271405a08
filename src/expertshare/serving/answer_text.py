"""An answer's text as it may be shown: up to the first stop string, and never a part of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from expertshare.decoding import TextStream


@dataclass(slots=True)
class AnswerText:
    """Takes tokens block by block. What could be the beginning of a stop string is held back until it is known.

    stopped: a stop string was found; the text ends before it.
    """

    decode: Callable[[Sequence[int]], str]
    stops: tuple[str, ...] = ()
    stopped: bool = False
    _stream: TextStream = field(init=False)
    _held: str = ""

    def __post_init__(self) -> None:
        self._stream = TextStream(self.decode)

    def feed(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens add. With `last`, also what was held back."""
        if self.stopped:
            return ""
        text = self._held + self._stream.feed(token_ids, last=last)
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        ready = len(text) if last else len(text) - self._beginning_of_a_stop(text)
        self._held = text[ready:]
        return text[:ready]

    def _beginning_of_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                return length
        return 0
