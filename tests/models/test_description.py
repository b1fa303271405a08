"""Facts about a model, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertshare.models import describe, load_model, save_model
from expertshare.models.description import router_rule

from .test_saving import LLADA2, LLADA22, SOFTMAX, random_model


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_and_parameters(dtype: torch.dtype, width: int, tmp_path: Path) -> None:
    facts = describe(load_model(save_model(random_model(LLADA2), tmp_path), dtype))
    experts = 8 * 3 * 16 * 6
    attention = 2 * (32 * 16 + 16 * 16 + 2 * 8 + 2 * 16)
    router = 8 * 16
    others = 2 * 40 * 16 + 16 + 3 * 16 * 24 + 3 * 16 * 12
    assert facts.num_parameters == experts + attention + router + others
    assert facts.bytes_per_expert == 3 * 16 * 6 * width
    assert facts.experts_bytes == experts * width
    assert facts.total_bytes == (experts + attention + others) * width + (router + 8) * 4
    assert facts.experts_share == facts.experts_bytes / facts.total_bytes


def test_tied_weights_count_once(tmp_path: Path) -> None:
    tied = replace(LLADA2, tie_embeddings=True)
    facts = describe(load_model(save_model(random_model(tied), tmp_path)))
    untied = describe(load_model(save_model(random_model(LLADA2), tmp_path)))
    assert untied.num_parameters - facts.num_parameters == 40 * 16
    assert untied.total_bytes - facts.total_bytes == 40 * 16 * 4


def test_coresets(tmp_path: Path) -> None:
    facts = describe(load_model(save_model(random_model(LLADA2), tmp_path)))
    assert (facts.min_coreset_inside, facts.min_coreset_ignore) == (4, 2)
    assert facts.default_budget == 6
    assert facts.expert_capacity is None
    newer = describe(load_model(save_model(random_model(LLADA22), tmp_path / "newer")))
    assert (newer.min_coreset_inside, newer.expert_capacity) == (2, 6)


def test_the_rule_in_words() -> None:
    assert router_rule(LLADA2.router) == (
        "sigmoid per expert, balancing bias for selection only, best 2 of 4 groups, top 2 of 8, weights renormalised, "
        "times 2.5"
    )
    assert router_rule(replace(SOFTMAX, renormalise=False)) == (
        "softmax over all experts, top 2 of 8, weights not renormalised"
    )
