"""Text to token ids and back: for several threads, and up to the first stop string."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from expertshare.decoding import TextStream
from expertshare.errors import InputError
from expertshare.models import LoadedModel, decode_answer, encode_chat, encode_prompt
from expertshare.serving.requests import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Codec:
    """The model's tokenizer, which encodes behind a lock. Raises InputError for a model without one."""

    def __init__(self, loaded: LoadedModel) -> None:
        if loaded.tokenizer is None:
            raise InputError(f"{loaded.path} has no tokenizer: put the model's tokenizer.json there")
        self._tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self._lock = threading.Lock()

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation; in a thread, because a long one takes a while. Raises InputError."""
        turns = [{"role": message.role, "content": _checked(message.text)} for message in messages]
        return await asyncio.to_thread(self._locked_chat, turns)

    async def encode_text(self, text: str) -> list[int]:
        """Ids of a text as it is. Raises InputError."""
        return await asyncio.to_thread(self._locked_text, _checked(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer. Not behind the lock: it changes nothing in a tokenizer, and may not wait for a long prompt
        to be encoded."""
        return decode_answer(self._tokenizer, ids)

    def _locked_chat(self, turns: list[dict[str, str]]) -> list[int]:
        with self._lock:
            return encode_chat(self._tokenizer, turns)

    def _locked_text(self, text: str) -> list[int]:
        with self._lock:
            return encode_prompt(self._tokenizer, text, chat=False)


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"expected text, got half of a surrogate pair at character {error.start}: send well-formed Unicode"
        ) from error
    return text


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
