"""What plug-ins of serving engines share: settings from the environment, and routing of an engine's batch.

An engine gives router logits of T tokens. In a diffusion batch these are [batch, block], contiguous, and every block is
a sharing group.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.errors import InputError, PolicyError
from expertshare.routing import RoutingPolicy, parse_policy, route, router_scores

POLICY_VARIABLE = "EXPERTSHARE_POLICY"
BLOCK_VARIABLE = "EXPERTSHARE_BLOCK_LENGTH"
DEFAULT_BLOCK_LENGTH = 32
WHOLE_BATCH = "batch"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """policy: as text, checked. block_length: tokens of a sharing group; 0 makes the whole batch one."""

    policy: str
    block_length: int = DEFAULT_BLOCK_LENGTH

    def __post_init__(self) -> None:
        _parsed(self.policy)

    def bound(self, spec: RouterSpec) -> RoutingPolicy:
        """The policy for one router; PolicyError where it cannot work with it."""
        return _parsed(self.policy).bind(spec)


@lru_cache(maxsize=8)
def _parsed(policy: str) -> RoutingPolicy:
    parsed = parse_policy(policy)
    if parsed.needs_steps:
        raise PolicyError(
            f"expected a policy that looks at one forward alone, got {policy!r}: engines say neither which tokens are "
            "masked nor which step it is; leave out voters=masked and reuse"
        )
    return parsed


def read_settings(environment: Mapping[str, str] | None = None) -> EngineSettings | None:
    """What the environment asks for, None where it names no policy.

    Raises PolicyError for a policy, InputError for a block length that cannot be.
    """
    values = os.environ if environment is None else environment
    policy = values.get(POLICY_VARIABLE, "").strip()
    if not policy:
        return None
    length = values.get(BLOCK_VARIABLE, str(DEFAULT_BLOCK_LENGTH)).strip()
    if length == WHOLE_BATCH:
        return EngineSettings(policy, 0)
    if not length.isdecimal() or int(length) < 1:
        raise InputError(f"expected {BLOCK_VARIABLE} as a number of tokens or {WHOLE_BATCH!r}, got {length!r}")
    return EngineSettings(policy, int(length))


def route_batch(
    logits_TE: Tensor,
    spec: RouterSpec,
    settings: EngineSettings,
    *,
    bias_E: Tensor | None = None,
    live_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights float32 and expert ids int32 [T, K] under the policy.

    A batch that is no whole number of blocks holds prompts of any length: it is routed by the model's own rule. An
    unused slot of a live token repeats its best expert with weight 0, so that no other expert is needed; tokens that
    are not live have ids -1. live_T: bool, by default all.
    """
    num_tokens, num_experts = logits_TE.shape
    if num_tokens == 0:
        nothing = logits_TE.new_empty((0, spec.top_k), dtype=torch.float32)
        return nothing, nothing.to(torch.int32)
    length = settings.block_length or max(1, num_tokens)
    shares = num_tokens % length == 0
    policy = settings.bound(spec) if shares else parse_policy("vanilla").bind(spec)
    groups = num_tokens // length if shares else 1
    live = live_T if live_T is not None else torch.ones(num_tokens, dtype=torch.bool, device=logits_TE.device)
    scores = router_scores(logits_TE.view(groups, -1, num_experts), live.view(groups, -1), spec, bias_E)
    _, plan = route(scores, policy, spec)
    ids_TK = torch.where(plan.expert_ids_TK < 0, plan.expert_ids_TK[:, :1], plan.expert_ids_TK)
    return plan.weights_TK.contiguous(), ids_TK.to(torch.int32).contiguous()


@lru_cache(maxsize=64)
def _plain_router(num_experts: int, top_k: int, activation: str, renormalise: bool) -> RouterSpec:
    assert activation in ("softmax", "sigmoid")
    chosen = cast(Literal["softmax", "sigmoid"], activation)
    return RouterSpec(num_experts=num_experts, top_k=top_k, activation=chosen, renormalise=renormalise)


@torch.library.custom_op("expertshare::shared_routing", mutates_args=())
def shared_routing(
    logits: Tensor, policy: str, block_length: int, top_k: int, activation: str, renormalise: bool
) -> tuple[Tensor, Tensor]:
    """`route_batch` as one operation, which engines that compile their models do not look into.

    For plain routers: an activation ("softmax" or "sigmoid"), K best, no groups and no bias.
    """
    spec = _plain_router(logits.shape[-1], top_k, activation, renormalise)
    return route_batch(logits, spec, EngineSettings(policy, block_length))


@shared_routing.register_fake
def _(
    logits: Tensor, policy: str, block_length: int, top_k: int, activation: str, renormalise: bool
) -> tuple[Tensor, Tensor]:
    del policy, block_length, activation, renormalise
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)
