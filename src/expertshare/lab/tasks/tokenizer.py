"""The reference model's tokenizer, byte-level BPE whose vocabulary is the words of the generated tasks, and problems of
theirs in its chat format, to train the model on.

Text is cut by the GPT-2 pattern (letters, digits, punctuation and spaces apart, one leading space kept). A
cut that is in the vocabulary is one token (`ignore_merges`); any other text falls back to its bytes, so every
UTF-8 string survives a round trip. Whole words instead of learnt merges: merges would spend a third of the
vocabulary on fragments that never occur.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from expertshare.errors import InputError
from expertshare.lab.tasks.generation import TASKS, iterate_items
from expertshare.lab.tasks.types import MAX_VALUE
from expertshare.training.batches import Sample
from expertshare.training.config import TrainingConfig

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


class TaskProblems:
    """Training items of the generated tasks and the vocabulary that they are written in; the seed of both."""

    def __init__(self, seed: int) -> None:
        self._seed, self._tokenizer = seed, build_tokenizer(seed)
        self.vocabulary: Mapping[str, int] = self._tokenizer.get_vocab()
        self.mask_id, self.eos_id, self.pad_id = (self._id(token) for token in (MASK, EOS, PAD))

    def _id(self, token: str) -> int:
        token_id: int | None = self._tokenizer.token_to_id(token)
        assert token_id is not None, f"the task tokenizer has no {token}"
        return token_id

    def draw(self, config: TrainingConfig, step: int) -> list[Sample]:
        """The problems of one step, a function of seed and step alone: a resumed run sees what it would have seen."""
        random = Random(f"{self._seed}:{step}")
        names = random.choices(list(config.mixture), weights=list(config.mixture.values()), k=config.samples_per_step)
        samples = []
        for name in config.mixture:
            items = iterate_items(name, split="train", seed=random.getrandbits(48))
            samples += [self.encode(item.prompt, item.reference) for item in islice(items, names.count(name))]
        return samples

    def encode(self, prompt: str, answer: str) -> Sample:
        """Token ids of `<|user|>prompt<|assistant|>`, and of `answer<|endoftext|>`."""
        prompt_ids = self._tokenizer.encode(f"{USER}{prompt}{ASSISTANT}").ids
        return Sample(tuple(prompt_ids), (*self._tokenizer.encode(answer).ids, self.eos_id))

    def save_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer's files beside a model."""
        save_tokenizer(folder, self._tokenizer)
