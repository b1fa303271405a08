"""What the measurements of single blocks rest on: knock-outs reach what they are meant to reach, and nothing else."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from numpy.testing import assert_allclose

from expertshare.api import load
from expertshare.config import RouterSpec
from expertshare.models import LoadedModel
from expertshare.types import RouterScores
from lab.report.conftest import ROOT


@pytest.fixture(scope="module")
def blocks() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("noisy_blocks")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return load(ROOT / "models" / "reference", dtype="float32")


def test_knock_outs_touch_their_own_row_and_masks_only_answers(blocks: ModuleType, reference: LoadedModel) -> None:
    config = reference.config
    prompt, answer = list(range(10, 50)), tuple(range(60, 75))
    (block,) = blocks.noisy_blocks([(prompt, answer)], config, torch.Generator().manual_seed(1))
    assert len(block.tokens_S) == 64
    assert block.tokens_S[:40].tolist() == prompt
    assert (block.tokens_S[block.loss_S] == config.mask_id).all()
    assert block.clean_S[40:56].tolist() == [*answer, config.eos_ids[0]]
    assert not block.loss_S[56:].any()

    layers = [blocks.Bans() for _ in range(config.num_moe_layers)]
    plain = blocks.forward(reference, block, layers, 1)
    used = layers[0].plans[0][1].expert_ids_TK[-32:].unique()
    masks = torch.zeros(config.num_moe_layers, 6, config.router.num_experts, dtype=torch.bool)
    masks[0, 3, used] = True  # the last block of the second row loses most of its experts
    for replace in (True, False):
        bans = [blocks.Bans(banned_GE=mask, replace=replace) for mask in masks]
        losses = blocks.forward(reference, block, bans, 3)
        assert_allclose(losses[[0, 2]], plain.expand(2), rtol=1e-4)
        assert abs(losses[1] - plain) > 1e-3


def test_dropping_leaves_the_other_experts_of_a_token(blocks: ModuleType) -> None:
    spec = RouterSpec(
        num_experts=4,
        top_k=2,
        activation="sigmoid",
        renormalise=True,
        scaling=1.0,
        num_groups=1,
        kept_groups=1,
        has_bias=False,
    )
    affinity = torch.tensor([[[0.9, 0.5, 0.3, 0.1], [0.1, 0.2, 0.6, 0.8]]])
    scores = RouterScores(affinity, affinity, torch.ones(1, 2, dtype=torch.bool))
    banned = torch.tensor([[True, False, False, False]])
    dropping, replacing = blocks.Bans(banned_GE=banned, replace=False), blocks.Bans(banned_GE=banned)
    assert dropping.select(scores, spec).member_GE.all()
    full = dropping.select(scores, spec)
    assert dropping.assign(scores, full, spec).expert_ids_TK.tolist() == [[-1, 1], [3, 2]]
    assert replacing.select(scores, spec).member_GE.tolist() == [[False, True, True, True]]
    assert replacing.assign(scores, replacing.select(scores, spec), spec).expert_ids_TK.tolist() == [[1, 2], [3, 2]]
