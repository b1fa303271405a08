"""Problems to train the reference models on: drawn from the generated tasks, in their tokenizer's chat format."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from random import Random

from expertshare.lab.tasks.generation import iterate_items
from expertshare.lab.tasks.tokenizer import ASSISTANT, EOS, MASK, PAD, USER, build_tokenizer, save_tokenizer
from expertshare.training.batches import Sample
from expertshare.training.config import TrainingConfig


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
