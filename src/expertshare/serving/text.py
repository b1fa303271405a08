"""Text to token ids and back: for several threads, and up to the first stop string."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from expertshare.decoding import TextStream
from expertshare.errors import InputError
from expertshare.models import LoadedModel, decode_answer, encode_chat, encode_prompt
from expertshare.models.tokenizer import byte_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Prompt = str | list[int] | list[dict[str, str]]
"""Text as it is, token ids, or the turns of a conversation, each with role and content."""


class Codec:
    """The model's tokenizer, which encodes behind a lock. Raises InputError for a model without one."""

    def __init__(self, loaded: LoadedModel) -> None:
        if loaded.tokenizer is None:
            raise InputError(f"{loaded.path} has no tokenizer: put the model's tokenizer.json there")
        self._tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.byte_ids = byte_ids(loaded.tokenizer)
        self._lock = threading.Lock()

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; in a thread, because a long one takes a while. Raises InputError."""
        if isinstance(prompt, str):
            return await asyncio.to_thread(self._locked, encode_prompt, _checked(prompt), chat=False)
        turns = [{**turn, "content": _checked(turn["content"])} for turn in prompt if not isinstance(turn, int)]
        if not turns:
            return cast("list[int]", prompt)
        return await asyncio.to_thread(self._locked, encode_chat, turns)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer. Not behind the lock: it changes nothing in a tokenizer, and may not wait for a long prompt
        to be encoded."""
        return decode_answer(self._tokenizer, ids)

    def _locked(self, encode: Callable[..., list[int]], what: object, **how: object) -> list[int]:
        with self._lock:
            return encode(self._tokenizer, what, **how)


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
    byte_ids: frozenset[int] = frozenset()
    stopped: bool = False
    _stream: TextStream = field(init=False)
    _held: str = ""

    def __post_init__(self) -> None:
        self._stream = TextStream(self.decode, self.byte_ids)

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
