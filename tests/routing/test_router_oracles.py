"""Vanilla routing against transformers' own router modules, with random weights and hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRouter
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from expertshare.config import RouterSpec
from expertshare.routing import make_policy, route, router_scores

from .cases import plain_spec

HIDDEN, GROUPS, LENGTH = 16, 3, 11


def randomised(module: Any, seed: int) -> Any:
    """Give every parameter and buffer random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    return module


def hidden_states(seed: int) -> Tensor:
    return torch.randn(GROUPS * LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def assert_same_routing(
    logits_TE: Tensor,
    theirs: tuple[Tensor, Tensor],
    spec: RouterSpec,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
) -> None:
    """theirs: ids and weights, [T, K] each, in any order of slots."""
    live = torch.ones(GROUPS, LENGTH, dtype=torch.bool)
    scores = router_scores(logits_TE.reshape(GROUPS, LENGTH, -1), live, spec, bias_E)
    _, plan = route(scores, make_policy("vanilla"), spec, expert_scale_E=expert_scale_E)
    ours_by_id, theirs_by_id = plan.expert_ids_TK.sort(dim=-1), theirs[0].sort(dim=-1)
    assert torch.equal(ours_by_id.values, theirs_by_id.values)
    torch.testing.assert_close(
        plan.weights_TK.gather(-1, ours_by_id.indices),
        theirs[1].gather(-1, theirs_by_id.indices),
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(
    ("config_class", "router_class"), [(OlmoeConfig, OlmoeTopKRouter), (Qwen3MoeConfig, Qwen3MoeTopKRouter)]
)
@torch.no_grad()
def test_softmax_routers(config_class: Any, router_class: Any, renormalise: bool) -> None:
    config = config_class(hidden_size=HIDDEN, num_experts=64, num_experts_per_tok=8, norm_topk_prob=renormalise)
    router = randomised(router_class(config), seed=1)
    logits, weights, ids = router(hidden_states(2))
    assert_same_routing(logits, (ids, weights), plain_spec(64, 8, renormalise=renormalise))


@pytest.mark.parametrize(
    ("experts", "groups", "kept", "scaling"),
    [(64, 8, 4, 1.0), (256, 8, 4, 2.5), (24, 3, 1, 2.5), (32, 1, 1, 2.5)],
)
@torch.no_grad()
def test_glm4_moe_router(experts: int, groups: int, kept: int, scaling: float) -> None:
    """The rule of LLaDA2: sigmoid, selection bias (negative ones too), group limit, scaling."""
    config = Glm4MoeConfig(
        hidden_size=HIDDEN,
        n_routed_experts=experts,
        num_experts_per_tok=8,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=True,
        routed_scaling_factor=scaling,
    )
    router = randomised(Glm4MoeTopkRouter(config), seed=experts)
    assert (router.e_score_correction_bias < 0).any()
    logits, weights, ids = router(hidden_states(4))
    spec = RouterSpec(
        num_experts=experts,
        top_k=8,
        activation="sigmoid",
        renormalise=True,
        scaling=scaling,
        num_groups=groups,
        kept_groups=kept,
        has_bias=True,
    )
    assert_same_routing(logits, (ids, weights), spec, bias_E=router.e_score_correction_bias)


@torch.no_grad()
def test_diffusion_gemma_router() -> None:
    """Its router normalises and scales the hidden states before the projection, and scales each expert's weight."""
    config = DiffusionGemmaTextConfig(hidden_size=HIDDEN, num_experts=128, top_k_experts=8)
    router = randomised(DiffusionGemmaTextRouter(config), seed=6)
    hidden = hidden_states(7)
    probabilities, weights, ids = router(hidden)
    rms = (hidden.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt()
    logits = functional.linear(hidden / rms * router.scale * HIDDEN**-0.5, router.proj.weight)
    torch.testing.assert_close(logits.softmax(dim=-1), probabilities)  # these are its logits
    spec = plain_spec(128, 8, renormalise=True, has_expert_scale=True)
    assert_same_routing(logits, (ids, weights), spec, expert_scale_E=router.per_expert_scale)
