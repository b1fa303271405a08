"""The reference model's tokenizer: byte-level BPE whose vocabulary is the words of the generated tasks.

Text is cut by the GPT-2 pattern (letters, digits, punctuation and spaces apart, one leading space kept). A
cut that is in the vocabulary is one token (`ignore_merges`); any other text falls back to its bytes, so every
UTF-8 string survives a round trip. Whole words instead of learnt merges: merges would spend a third of the
vocabulary on fragments that never occur.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from expertshare.errors import InputError
from expertshare.lab.tasks.facts import MAX_VALUE
from expertshare.lab.tasks.generation import TASKS, iterate_items

MASK, EOS, PAD, USER, ASSISTANT = "<|mask|>", "<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (MASK, EOS, PAD, USER, ASSISTANT)
MAX_VOCAB_SIZE = 1024
ITEMS_PER_TASK = 12_000

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}" + "{{- '" + USER + "' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '" + ASSISTANT + "' + message['content'] + '" + EOS + "' -}}"
    "{%- else -%}{{- raise_exception('expected the role user or assistant, got ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + ASSISTANT + "' -}}{%- endif -%}"
)


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _words(seed: int) -> list[str]:
    """The pieces into which train items are cut, and 0..MAX_VALUE with and without a space; sorted."""
    texts: set[str] = set()
    for task in TASKS:
        for item in islice(iterate_items(task, split="train", seed=seed), ITEMS_PER_TASK):
            texts.update((item.prompt, item.reference))
    texts.update(f"{space}{n}" for n in range(MAX_VALUE + 1) for space in ("", " "))
    cut = _byte_level()
    return sorted({piece for text in texts for piece, _ in cut.pre_tokenize_str(text)})


def build_tokenizer(seed: int = 0) -> Tokenizer:
    """The tokenizer for the words that train items of this seed hold; ids 0..4 are SPECIAL_TOKENS.

    Raises InputError if the words no longer fit MAX_VOCAB_SIZE.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ordered = dict.fromkeys([*SPECIAL_TOKENS, *alphabet, *_words(seed)])
    if len(ordered) > MAX_VOCAB_SIZE:
        found = f"got {len(ordered)}; use fewer words in the tasks"
        raise InputError(f"expected at most {MAX_VOCAB_SIZE} vocabulary entries, {found}")
    vocab = {piece: index for index, piece in enumerate(ordered)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = _byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(directory: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json, as transformers.AutoTokenizer reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    (tokenizer or build_tokenizer()).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "mask_token": MASK,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
