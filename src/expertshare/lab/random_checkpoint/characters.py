"""A tiny tokenizer for random checkpoints: one token per byte, and the model's special tokens at their own ids."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import pre_tokenizers

from expertshare.config import ModelConfig
from expertshare.errors import ConfigError

MASK, EOS, PAD = "<|mask|>", "<|endoftext|>", "<|pad|>"
NUM_BYTES = 256
_PRINTABLE = range(0x20, 0x7F)


def first_byte_id(config: ModelConfig) -> int:
    """Where the tokens of the 256 bytes begin: behind low special ids, before high ones. Raises ConfigError."""
    special = sorted({config.mask_id, config.pad_id, *config.eos_ids})
    start = 0
    for token in [*special, config.vocab_size]:
        if token - start >= NUM_BYTES:
            return start
        start = token + 1
    raise ConfigError(f"expected ids for {NUM_BYTES} tokens beside the special ones, got {config.vocab_size} in all")


def printable_ids(config: ModelConfig) -> range:
    """Tokens of the printable ASCII characters."""
    start = first_byte_id(config)
    return range(start + _PRINTABLE.start, start + _PRINTABLE.stop)


def tokenizer_files(config: ModelConfig) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json. Written as JSON, since a vocabulary with holes is what is wanted."""
    start, special = first_byte_id(config), _special(config)
    vocab = {character: start + byte for byte, character in _byte_characters().items()} | special
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": text, **flags} for text, token in sorted(special.items())],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "mask_token": MASK,
        "pad_token": PAD if PAD in special else EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_positions,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }


def _special(config: ModelConfig) -> dict[str, int]:
    """Ids by text; a model may pad with its end token."""
    names = {MASK: config.mask_id, EOS: config.eos_ids[0]}
    return names if config.pad_id in names.values() else {**names, PAD: config.pad_id}


def _byte_characters() -> dict[int, str]:
    """The character by which byte-level tokenizers write each byte.

    Printable bytes of Latin-1 stand for themselves; the others, in order, for the characters from U+0100 on.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = {byte: chr(byte) for byte in range(NUM_BYTES) if chr(byte) in alphabet}
    rest = (byte for byte in range(NUM_BYTES) if byte not in own)
    return {**own, **{byte: chr(0x100 + place) for place, byte in enumerate(rest)}}
