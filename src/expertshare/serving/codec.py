"""Text to token ids and back, for several threads: a tokenizer encodes for one at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
