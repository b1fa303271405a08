"""Problems as token ids, in the chat format that the model is used with."""

from __future__ import annotations

from tokenizers import Tokenizer

from expertshare.lab.tasks.tokenizer import ASSISTANT, EOS, MASK, PAD, USER
from expertshare.training.objective import Sample


class ChatEncoder:
    """Encodes a problem as `<|user|>prompt<|assistant|>answer<|endoftext|>`, the reference tokenizer's template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.mask_id, self.eos_id, self.pad_id = (self._id(token) for token in (MASK, EOS, PAD))

    def _id(self, token: str) -> int:
        token_id: int | None = self._tokenizer.token_to_id(token)
        assert token_id is not None, f"the task tokenizer has no {token}"
        return token_id

    def __call__(self, prompt: str, answer: str) -> Sample:
        """Token ids of the prompt with its markers, and of the answer with its end."""
        prompt_ids = self._tokenizer.encode(f"{USER}{prompt}{ASSISTANT}").ids
        return Sample(tuple(prompt_ids), (*self._tokenizer.encode(answer).ids, self.eos_id))
