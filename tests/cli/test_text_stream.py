"""Streaming: text is never taken back, and never holds half a character."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from expertshare.cli.generate import AnswerPrinter, TextStream
from expertshare.decoding import BlockResult
from expertshare.decoding.options import REPLACEMENT
from expertshare.lab.tasks.tokenizer import build_tokenizer
from expertshare.models import decode_answer
from expertshare.models.tokenizer import byte_ids

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(0))


def decode(token_ids: object) -> str:
    return decode_answer(TOKENIZER, token_ids)  # type: ignore[arg-type]


@given(st.text(alphabet=st.characters(exclude_characters=REPLACEMENT, codec="utf-8"), max_size=30), st.data())
def test_pieces_join_to_the_text_and_hold_whole_characters(text: str, data: st.DataObject) -> None:
    token_ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=8)))
    stream = TextStream(decode)
    pieces = [stream.feed(token_ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(token_ids)], strict=True)]
    pieces.append(stream.feed([], last=True))
    assert "".join(pieces) == text
    assert all(REPLACEMENT not in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte() -> None:
    first, second = TOKENIZER("é", add_special_tokens=False)["input_ids"]
    stream = TextStream(decode)
    assert stream.feed([first]) == ""
    assert stream.feed([second]) == "é"


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    first, _ = TOKENIZER("é", add_special_tokens=False)["input_ids"]
    stream = TextStream(decode)
    assert stream.feed([first]) == ""
    assert stream.feed([], last=True) == REPLACEMENT


def block(row: int, text: str, *, last: bool = False) -> BlockResult:
    ids = tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])
    finish = "length" if last else None
    return BlockResult(row=row, block=0, token_ids=ids, finish_reason=finish, steps=1, forwards=1)  # type: ignore[arg-type]


def test_one_answer_has_no_heading() -> None:
    written: list[str] = []
    printer = AnswerPrinter(prompts=["p"], decode=decode, write=written.append)
    printer.hear(block(0, "one"))
    assert "".join(written) == "one"
    printer.hear(block(0, " two", last=True))
    assert "".join(written) == "one two\n"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_answers_come_in_the_order_of_their_prompts(order: tuple[int, ...]) -> None:
    written: list[str] = []
    printer = AnswerPrinter(prompts=["a\nb", "c", "d" * 100], decode=decode, write=written.append)
    for row in order:
        printer.hear(block(row, f"x{row}"))
    for row in order:
        printer.hear(block(row, "y", last=True))
    long = "d" * 69 + "…"
    assert "".join(written) == f"[1/3] a\nx0y\n\n[2/3] c\nx1y\n\n[3/3] {long}\nx2y\n"


def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece's: words it knows, and one token for every byte of what it does not."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "▁", "The", "▁answer", "▁is", "▁42", "."]
    model = models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    ("blocks", "pieces"),
    [
        # é is complete, and what follows makes the run of its bytes unreadable
        (["a ▁ C3 A9", "F0 The ▁answer", "▁is ▁42 ."], ["a ", "\ufffd\ufffd\ufffdThe answer", " is 42."]),
        (["a ▁ C3", "A9 The", "▁answer"], ["a ", "éThe", " answer"]),
        (["a 0A", "0A The"], ["a", "\n\nThe"]),
        (["F0 9F", "98 80"], ["", "😀"]),
        (["F0", "The", "F0"], ["", "\ufffdThe", "\ufffd"]),
    ],
)
def test_runs_of_single_bytes_wait_for_their_end(blocks: list[str], pieces: list[str]) -> None:
    tokenizer = byte_fallback()
    names = [
        [f"<0x{word}>" if len(word) == 2 and word.isupper() | word.isdigit() else word for word in block.split()]
        for block in blocks
    ]
    ids = [tokenizer.convert_tokens_to_ids(block) for block in names]
    stream = TextStream(partial(decode_answer, tokenizer), byte_ids(tokenizer))
    assert len(stream.byte_ids) == 256
    assert not byte_ids(TOKENIZER)
    found = [stream.feed(block, last=block is ids[-1]) for block in ids]
    assert found == pieces
    assert "".join(found) == decode_answer(tokenizer, [i for block in ids for i in block])
