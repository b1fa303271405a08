"""Text to token ids and back, by the checkpoint's own tokenizer and chat template; no remote code is run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from expertshare.errors import CheckpointError, InputError
from expertshare.models.config_keys import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MASK_SPELLINGS = ("<|mask|>", "<|MASK|>", "<|mdm_mask|>", "[MASK]", "<mask>")
"""How tokenizers of diffusion models spell a mask token that they do not declare as one."""
_OPEN, _CLOSE = "\uf8f0", "\uf8f1"
"""Private characters: between them a template carries the number of a content that is no control token."""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model directory, None where there is no tokenizer file; CheckpointError if it is unusable."""
    if not any((directory / name).exists() for name in _FILES):
        return None
    # Imported here: it is slow, and neither configs nor weights need it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # A tokenizer.json is complete. Read directly, it asks neither config.json nor remote code for a class.
    kind = PreTrainedTokenizerFast if (directory / "tokenizer.json").exists() else AutoTokenizer
    try:
        return kind.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the tokenizer in {directory} cannot be loaded ({reason}): download it again") from error


def token_ids(tokenizer: PreTrainedTokenizerBase | None) -> TokenIds:
    """What the tokenizer says of special tokens: the declared ones, or a mask token found by its usual spelling."""
    if tokenizer is None:
        return TokenIds()
    mask = tokenizer.mask_token_id
    if mask is None:
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        mask = next((special[spelling] for spelling in _MASK_SPELLINGS if spelling in special), None)
    eos = tokenizer.eos_token_id
    return TokenIds(mask=mask, eos=() if eos is None else (eos,), pad=tokenizer.pad_token_id)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool | None = None) -> list[int]:
    """Ids of a prompt: one user turn of the chat template, up to where the answer starts, or the text as it is.

    chat: None uses the template where the tokenizer has one, True insists on it, False never uses it. Raises
    InputError for an empty prompt, or for chat=True without a template.
    """
    if not text.strip():
        raise InputError("a prompt must hold some text, got an empty one: write what the model should answer")
    if chat is None:
        chat = tokenizer.chat_template is not None
    if not chat:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokenizer.chat_template is None:
        raise InputError("this model's tokenizer has no chat template: give the prompt as plain text (chat=False)")
    return encode_chat(tokenizer, [{"role": "user", "content": text}])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation by the chat template, up to where the answer starts.

    messages: role and content each. Control tokens are the template's alone: what is spelled like one in a content is
    encoded as ordinary text. Raises InputError without a template, or where it refuses them.
    """
    if tokenizer.chat_template is None:
        raise InputError("this model's tokenizer has no chat template: give the prompt as plain text")
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    quoted: list[str] = []
    turns = [dict(message) for message in messages]
    for turn in turns:
        content = turn["content"].strip()
        if any(spelling in content for spelling in (*control, _OPEN)):
            turn["content"] = turn["content"].replace(content, f"{_OPEN}{len(quoted)}{_CLOSE}", 1)
            quoted.append(content)
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(f"this model's chat template refuses the messages ({error}): change them") from error
    ids: list[int] = []
    for number, part in enumerate(re.split(f"{_OPEN}([0-9]+){_CLOSE}", str(rendered)) if quoted else [str(rendered)]):
        text = quoted[int(part)] if number % 2 else part
        if text:
            ids += tokenizer(text, add_special_tokens=False, split_special_tokens=bool(number % 2))["input_ids"]
    return ids


def byte_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that stand for one byte each (byte fallback, as in SentencePiece's models); empty for other tokenizers."""
    found = (tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(n for n in found if isinstance(n, int) and n != tokenizer.unk_token_id)


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of generated ids, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
