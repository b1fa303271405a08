"""Stop strings, wherever blocks end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertshare.serving.text import AnswerText

letters = st.text("abc", max_size=14)


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


@given(letters, st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 14), max_size=5))
def test_the_text_ends_before_the_first_stop_string_and_nothing_of_it_is_ever_shown(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    answer = AnswerText(decode, tuple(stops))
    edges = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    shown = ""
    for start, end in zip(edges, [*edges[1:], None], strict=True):
        if answer.stopped:
            break
        shown += answer.feed([ord(letter) for letter in text[start:end]], last=end is None)
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    if answer.stopped:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == text
        assert not any(stop in text for stop in stops)


def test_one_stop_string_is_found_where_it_begins_first() -> None:
    answer = AnswerText(decode, ("bc",))
    assert [answer.feed([ord(c)]) for c in "abbca"] == ["a", "", "b", "", ""]
    assert answer.stopped


@pytest.mark.parametrize(("blocks", "shown"), [(("ab", "ab"), ["", "ab"]), (("ab", "c"), ["", ""])])
def test_a_beginning_is_held_back_until_it_is_known(blocks: tuple[str, str], shown: list[str]) -> None:
    answer = AnswerText(decode, ("abc",))
    assert [answer.feed([ord(c) for c in block]) for block in blocks] == shown


def test_the_end_of_the_answer_releases_what_was_held_back() -> None:
    answer = AnswerText(decode, ("abc",))
    assert answer.feed([ord("a"), ord("b")], last=True) == "ab"
    assert not answer.stopped
