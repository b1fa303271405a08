"""Plans must use exactly the experts asked for, and each token K different ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertshare.errors import InputError
from expertshare.lab.bench.stage import loads, rotation


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    top_k = draw(st.integers(1, 8))
    num_experts = draw(st.integers(top_k, 48))
    tokens = draw(st.integers(1, 40))
    unique = draw(st.integers(top_k, min(num_experts, tokens * top_k)))
    return num_experts, tokens, top_k, unique


@given(shapes(), st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.5]))
def test_plan_has_exactly_the_unique_experts(shape: tuple[int, int, int, int], seed: int, skew: float) -> None:
    num_experts, tokens, top_k, unique = shape
    for plan in rotation(num_experts, tokens, top_k, unique, count=3, seed=seed, skew=skew):
        ids = plan.expert_ids_TK
        assert ids.shape == (tokens, top_k)
        assert all(len(set(row)) == top_k for row in ids.tolist())
        assert set(ids.flatten().tolist()) == set(plan.active_E.nonzero().flatten().tolist())
        assert int(plan.active_E.sum()) == unique
        assert plan.weights_TK.dtype == torch.float32
        torch.testing.assert_close(plan.weights_TK.sum(dim=1), torch.ones(tokens))


def test_loads_fall_with_the_rank_and_follow_the_skew() -> None:
    even, steep = loads(32, 8, 64, skew=0.0), loads(32, 8, 64, skew=1.0)
    assert even == [4] * 64
    assert sum(steep) == 256
    assert steep == sorted(steep, reverse=True)
    assert steep[0] == 32  # no expert serves a token twice
    assert min(steep) == 1


def test_neighbours_in_a_rotation_share_no_expert_if_two_sets_fit() -> None:
    plans = rotation(64, 8, 4, 16, count=4, seed=1)
    seen = torch.stack([plan.active_E for plan in plans]).sum(dim=0)
    assert bool((seen == 1).all())


def test_seed_decides_everything() -> None:
    first, second, other = (rotation(32, 8, 4, 10, count=2, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a.expert_ids_TK, b.expert_ids_TK) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0].expert_ids_TK, other[0].expert_ids_TK)


@pytest.mark.parametrize("unique", [3, 33, 65])
def test_impossible_numbers_of_experts_are_refused(unique: int) -> None:
    with pytest.raises(InputError, match="unique experts must"):
        rotation(32, 16, 4, unique, count=1, seed=0)
