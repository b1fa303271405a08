"""Proposals against formulas written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from expertshare.decoding.options import DecodingOptions
from expertshare.decoding.sampling import draw, propose, restrict

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 5.0], [0.0, 0.0, -1.0, 9.0]])  # the mask id, 3, always leads


def test_argmax_without_the_mask_id() -> None:
    """Next best token, ties to the lower id, probability over the vocabulary without the mask."""
    tokens, confidence = propose(LOGITS, DecodingOptions(), mask_id=3, uniform_CV=None)
    assert tokens.tolist() == [1, 0]
    expected = [
        math.exp(3) / (math.exp(1) + math.exp(3) + math.exp(2)),
        1 / (2 + math.exp(-1)),
    ]
    assert confidence.tolist() == pytest.approx(expected, rel=1e-6)
    assert confidence.dtype == torch.float32


def test_bfloat16_logits_get_a_float32_confidence() -> None:
    """The softmax is taken in float32 whatever the model's dtype."""
    _, confidence = propose(LOGITS.bfloat16(), DecodingOptions(), mask_id=3, uniform_CV=None)
    _, expected = propose(LOGITS, DecodingOptions(), mask_id=3, uniform_CV=None)
    assert torch.equal(confidence, expected)


def test_top_k_then_top_p() -> None:
    """top-p works on what top-k left, renormalised: .5/.3/.15/.05 at k=2 are .625/.375."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    kept = [
        restrict(logits, top_k, top_p).isfinite().tolist()[0]
        for top_k, top_p in ((2, None), (None, 0.79), (None, 0.81), (2, 0.6), (2, 0.65), (1, 1.0), (9, 1.0))
    ]
    assert kept == [
        [False, True, False, True],
        [False, True, False, True],
        [True, True, False, True],
        [False, True, False, False],
        [False, True, False, True],
        [False, True, False, False],
        [True, True, True, True],
    ]


def test_top_k_ties_go_to_the_lower_id() -> None:
    """Three equal scores, two places."""
    assert restrict(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), 2, None).isfinite().tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_tempered_distribution(temperature: float) -> None:
    """20,000 draws: frequencies within four standard errors of softmax(logits / temperature)."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 0.5]]).repeat(20_000, 1)
    uniform = draw([torch.Generator().manual_seed(3)], [20_000], 4)
    tokens, confidence = propose(logits, DecodingOptions(temperature=temperature), mask_id=3, uniform_CV=uniform)
    expected = (torch.tensor([0.0, 1.0, 2.0]) / temperature).softmax(dim=0)
    frequency = tokens.bincount(minlength=4)[:3] / 20_000
    assert (tokens != 3).all()
    assert ((frequency - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt()).all()
    model_says = torch.tensor([0.0, 1.0, 2.0]).softmax(dim=0)
    assert torch.allclose(confidence, model_says[tokens])  # neither noise nor temperature in the confidence


def test_confidence_ignores_the_restriction_unless_asked() -> None:
    """With top_k 1 the restricted distribution says 1.0; the model does not."""
    uniform = torch.full((2, 4), 0.5, dtype=torch.float64)
    own = DecodingOptions(temperature=1.0, top_k=1)
    _, confidence = propose(LOGITS, own, mask_id=3, uniform_CV=uniform)
    assert confidence.max() < 0.7
    asked = DecodingOptions(temperature=1.0, top_k=1, filtered_confidence=True)
    _, confidence = propose(LOGITS, asked, mask_id=3, uniform_CV=uniform)
    assert confidence.tolist() == [1.0, 1.0]


def test_sampling_stays_inside_the_restriction() -> None:
    """top_k 2 never yields the third token, whatever the noise."""
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.0]]).repeat(500, 1)
    uniform = draw([torch.Generator().manual_seed(0)], [500], 4)
    tokens, _ = propose(logits, DecodingOptions(temperature=3.0, top_k=2), mask_id=3, uniform_CV=uniform)
    assert set(tokens.tolist()) == {0, 1}


def test_extreme_noise_and_temperature_stay_finite() -> None:
    """A uniform number of exactly 0 and a tiny temperature neither crash nor pick the mask."""
    uniform = torch.zeros(2, 4, dtype=torch.float64)
    uniform[:, 1] = 1.0 - 2**-53
    tokens, confidence = propose(
        LOGITS, DecodingOptions(temperature=1e-30, filtered_confidence=True), mask_id=3, uniform_CV=uniform
    )
    assert tokens.tolist() == [1, 1]
    assert confidence.isfinite().all()


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-300])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}, {"filtered_confidence": True}])
def test_a_temperature_next_to_zero_takes_the_best_token(temperature: float, options: dict[str, Any]) -> None:
    logits = torch.tensor([[0.5, 3.0, 2.0, -1.0], [-4.0, -2.0, -3.0, 9.0]])
    settings = DecodingOptions(temperature=temperature, **options)
    uniform = draw([torch.Generator().manual_seed(1)], [2], 4)
    tokens, confidence = propose(logits, settings, mask_id=3, uniform_CV=uniform)
    assert tokens.tolist() == [1, 1]
    clean = logits.index_fill(1, torch.tensor([3]), float("-inf")).softmax(dim=1)[:, 1]
    torch.testing.assert_close(confidence, torch.ones(2) if "filtered_confidence" in options else clean)


def test_a_row_draws_from_its_own_generator() -> None:
    """The numbers of a row are those it would draw alone."""
    both = draw([torch.Generator().manual_seed(s) for s in (5, 6)], [2, 3], 4)
    alone = draw([torch.Generator().manual_seed(6)], [3], 4)
    assert torch.equal(both[2:], alone)
    assert both.dtype == torch.float64
