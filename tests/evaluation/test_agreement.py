"""Agreement of answers, by hand."""

from __future__ import annotations

import pytest

from expertshare.evaluation.comparison import agreement, token_agreement


@pytest.mark.parametrize(
    ("answer", "reference", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 9, 3, 9], [1, 2, 3, 4], 0.5),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([1, 2, 3, 4], [1, 2], 0.5),
        ([], [1, 2], 0.0),
        ([], [], 1.0),
        ([2, 3, 4], [1, 2, 3], 0.0),
    ],
)
def test_share_of_equal_positions(answer: list[int], reference: list[int], share: float) -> None:
    assert token_agreement(answer, reference) == share


def test_mean_over_prompts_not_over_tokens() -> None:
    found = agreement([(1,), (1, 2, 3, 9)], [(1,), (1, 2, 3, 4)])
    assert found.tokens == pytest.approx((1.0 + 0.75) / 2)
    assert found.exact == 0.5
