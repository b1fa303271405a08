"""One token per word and number, lossless on any text, and the same through transformers."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from expertshare.lab.tasks.generation import TASKS, generate_items, iterate_items
from expertshare.lab.tasks.tokenizer import build_tokenizer, save_tokenizer

SHARED = build_tokenizer(0)


def test_specials_have_fixed_ids_and_the_vocabulary_is_small(tokenizer: Tokenizer) -> None:
    names = ("<|mask|>", "<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>")
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() <= 1024


def test_another_seed_gives_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert build_tokenizer(5).to_str() == tokenizer.to_str()


@pytest.mark.parametrize("text", [f"{blank}{n}" for n in range(31) for blank in ("", " ")])
def test_numbers_are_single_tokens(text: str, tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(text).ids) == 1


def test_digits_are_apart_from_letters(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12x + 3").ids] == ["12", "x", " +", " 3"]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_word_of_both_splits_is_a_single_token(task: str, tokenizer: Tokenizer) -> None:
    stream = islice(iterate_items(task, split="train", seed=99), 1500)
    for item in [*stream, *generate_items(task, split="test", count=100, seed=98)]:
        for text in (item.prompt, item.reference):
            pieces = re.findall(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text)
            assert "".join(pieces) == text
            assert [tokenizer.decode([i]) for i in tokenizer.encode(text).ids] == pieces


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_round_trip_of_any_text(text: str) -> None:
    assert SHARED.decode(SHARED.encode(text).ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return directory


def test_auto_tokenizer_agrees(saved: Path, tokenizer: Tokenizer) -> None:
    loaded = AutoTokenizer.from_pretrained(saved)
    assert (loaded.mask_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    assert len(loaded) == tokenizer.get_vocab_size()
    for task in TASKS:
        for item in generate_items(task, split="test", count=20, seed=1):
            ids = loaded(item.reference)["input_ids"]
            assert ids == tokenizer.encode(item.reference).ids
            assert loaded.decode(ids) == item.reference
    assert loaded.decode(loaded("a , b . c 's é 🎉")["input_ids"]) == "a , b . c 's é 🎉"


def test_chat_template(saved: Path, tokenizer: Tokenizer) -> None:
    loaded = AutoTokenizer.from_pretrained(saved)
    user, answer = {"role": "user", "content": " Solve 3x = 12. "}, {"role": "assistant", "content": "#### 4"}
    prompt = [3, *tokenizer.encode(" Solve 3x = 12. ").ids, 4]
    opened = loaded.apply_chat_template([user], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert opened == prompt
    full = loaded.apply_chat_template([user, answer], tokenize=True, return_dict=False)
    assert full == [*prompt, *tokenizer.encode("#### 4").ids, 1]
