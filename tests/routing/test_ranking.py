"""Exact ranking: the same order as a plain sort by (score down, id up), for every float."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertshare.errors import ConfigError
from expertshare.routing.ranking import top_k_ids, top_k_mask

AWKWARD = st.sampled_from([0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 1.0, -1.0, 3.4e38, -3.4e38])
SCORES = st.lists(st.one_of(AWKWARD, st.floats(width=32, allow_nan=False)), min_size=1, max_size=12)


@given(SCORES, st.data())
def test_top_k_is_a_plain_sort(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    by_hand = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]
    assert top_k_ids(torch.tensor(scores), k).tolist() == by_hand
    assert top_k_mask(torch.tensor(scores), k).nonzero().flatten().tolist() == sorted(by_hand)


def test_zeros_of_either_sign_tie() -> None:
    assert top_k_ids(torch.tensor([-0.0, 0.0, -0.0]), 3).tolist() == [0, 1, 2]


def test_neighbouring_floats_do_not_tie() -> None:
    ladder = [-1.0]
    for _ in range(5):
        ladder.append(float(torch.nextafter(torch.tensor(ladder[-1]), torch.tensor(0.0))))
    assert all(low < high for low, high in pairwise(ladder))
    assert top_k_ids(torch.tensor(ladder), 6).tolist() == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("shape", [(256,), (3, 256), (2, 5, 256)])
def test_rows_are_independent_and_strides_do_not_matter(shape: tuple[int, ...]) -> None:
    scores = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0)).float()
    ids = top_k_ids(scores, 9)
    for row, row_ids in zip(scores.reshape(-1, 256), ids.reshape(-1, 9), strict=True):
        assert row_ids.tolist() == sorted(range(256), key=lambda e, row=row: (-float(row[e]), e))[:9]  # type: ignore[misc]
    strided = torch.stack([scores, -scores], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(top_k_ids(strided, 9), ids)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expects scores in float32, got torch.float64"):
        top_k_ids(torch.zeros(4, dtype=torch.float64), 2)
