"""Streaming: text is never taken back, and never holds half a character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from expertshare.cli.generate import AnswerPrinter, TextStream
from expertshare.decoding import BlockResult
from expertshare.decoding.options import REPLACEMENT
from expertshare.lab.tasks.tokenizer import build_tokenizer
from expertshare.models import decode_answer

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
