"""Expert sharing on the GPU: scores to coreset to plan in two kernels, without a word to the host."""

from __future__ import annotations

import struct
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.config import GroupLimit, RouterSpec
from expertshare.errors import ConfigError
from expertshare.kernels.triton.availability import check_devices
from expertshare.kernels.triton.tiles import power_of_two
from expertshare.routing import RoutingPolicy, SharingRule, route_layer, router_scores, runs_on_torch
from expertshare.types import Coreset, Routed, RouterScores, RoutingPlan

RANKINGS = {"all": 0, "votes": 1, "highest": 2, "coverage": 3}
LANES_AT_A_TIME = 2048
"""Scores that a program holds at once, as 64-bit keys: 8 tokens of 256 experts."""
MOST_EXPERTS = 4096


def route_layer_triton(
    x_GLD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    policy: RoutingPolicy,
    spec: RouterSpec,
    live_GL: Tensor,
    *,
    masked_GL: Tensor | None = None,
    previous: Coreset | None = None,
) -> Routed:
    """`route_layer`, with coreset, plan and counts from two kernels; by torch for a policy that no rule expresses."""
    if runs_on_torch(policy):
        return route_layer(x_GLD, weight_ED, bias_E, policy, spec, live_GL, masked_GL=masked_GL, previous=previous)
    with torch.autocast(x_GLD.device.type, enabled=False):
        logits_GLE = F.linear(x_GLD.float(), weight_ED.float())
    scores = replace(router_scores(logits_GLE, live_GL, spec, bias_E), masked_GL=masked_GL)
    return select_and_assign(scores, spec, policy.rule(spec), previous=previous)


def select_and_assign(
    scores: RouterScores,
    spec: RouterSpec,
    rule: SharingRule,
    *,
    previous: Coreset | None = None,
    expert_scale_E: Tensor | None = None,
) -> Routed:
    """routing.route and routing.count_load for a rule: the same coreset and experts to the bit, weights within the
    rounding of float32. For inference: weights have no gradient.

    Raises ConfigError for scores that are not float32 or not where Triton runs.
    """
    choice, affinity, live = _checked(scores, spec)
    found, used_GE = _allocated(choice, spec.top_k)
    if len(choice) == 0:
        found.plan.active_E.zero_()
        found.load_E.zero_()
        return found
    _find_coresets((choice, affinity, live), scores.masked_GL, previous, spec, rule, found, used_GE)
    scale_E = None if expert_scale_E is None else expert_scale_E.float().contiguous()
    _make_plan(choice, affinity, live, spec, rule, scale_E, found, used_GE)
    return found


def _allocated(choice_GLE: Tensor, top_k: int) -> tuple[Routed, Tensor]:
    """What the kernels write, and int32 [G, E] where they mark the experts that each group has used."""
    groups, length, num_experts = choice_GLE.shape
    device = choice_GLE.device
    member_GE = torch.empty((groups, num_experts), dtype=torch.bool, device=device)
    plan = RoutingPlan(
        torch.empty((groups * length, top_k), dtype=torch.int64, device=device),
        torch.empty((groups * length, top_k), dtype=torch.float32, device=device),
        torch.empty(num_experts, dtype=torch.bool, device=device),
    )
    load_E = torch.empty(num_experts, dtype=torch.int64, device=device)
    unique_G = torch.empty(groups, dtype=torch.int64, device=device)
    used_GE = torch.empty((groups, num_experts), dtype=torch.int32, device=device)
    return Routed(plan, load_E, unique_G, Coreset(member_GE)), used_GE


def _member(found: Routed) -> Tensor:
    assert found.coreset is not None
    return found.coreset.member_GE


def _find_coresets(
    scores: tuple[Tensor, Tensor, Tensor],
    masked_GL: Tensor | None,
    previous: Coreset | None,
    spec: RouterSpec,
    rule: SharingRule,
    found: Routed,
    used_GE: Tensor,
) -> None:
    from expertshare.kernels.triton.device.coreset import coreset_kernel

    choice, affinity, live = scores
    groups, length, num_experts = choice.shape
    only_masked = rule.voters == "masked" and masked_GL is not None
    covers = rule.ranking == "coverage"
    reach = _reach(spec, "inside" if rule.ballots == "grouped" else "ignore")
    sizes = _lanes(num_experts, reach, length, most_tokens=16)
    lanes = sizes["NGP"] * sizes["GSP"]
    coreset_kernel[(groups,)](
        choice,
        affinity,
        live,
        masked_GL.expand(live.shape).contiguous() if only_masked and masked_GL is not None else live,
        live if previous is None else previous.member_GE.contiguous(),
        _member(found),
        torch.empty((groups, lanes), dtype=torch.int64, device=choice.device),
        torch.empty((groups, length if covers else 0, lanes + 1), dtype=torch.float64, device=choice.device),
        used_GE,
        found.group_experts_G,
        found.plan.active_E,
        found.load_E,
        length,
        rule.size,
        _bits(rule.prefix_share or 0.0),
        _bits(rule.saturation or 0.0),
        NUM_EXPERTS=num_experts,
        TOP_K=spec.top_k,
        RANKING=RANKINGS[rule.ranking],
        FRONT=min(rule.protected, spec.top_k),
        WHOLE_FRONT=rule.keep_protected,
        HAS_SHARE=rule.prefix_share is not None,
        ONLY_MASKED=only_masked,
        HAS_PREVIOUS=previous is not None,
        KEYS_AT_A_TIME=min(16, lanes),
        **sizes,
        num_warps=8,
    )


def _make_plan(
    choice: Tensor,
    affinity: Tensor,
    live: Tensor,
    spec: RouterSpec,
    rule: SharingRule,
    scale_E: Tensor | None,
    found: Routed,
    used_GE: Tensor,
) -> None:
    from expertshare.kernels.triton.device.plan import plan_kernel

    groups, length, num_experts = choice.shape
    sizes = _lanes(num_experts, _reach(spec, rule.group_limit), length, most_tokens=4)
    plan_kernel[(groups, -(-length // sizes["TOKENS"]))](
        choice,
        affinity,
        live,
        _member(found),
        affinity if scale_E is None else scale_E,
        found.plan.expert_ids_TK,
        found.plan.weights_TK,
        found.plan.active_E,
        found.load_E,
        used_GE,
        found.group_experts_G,
        length,
        spec.top_k if rule.experts_per_token is None else rule.experts_per_token,
        _bits(rule.drop_share or 0.0),
        float(spec.scaling),
        NUM_EXPERTS=num_experts,
        TOP_K=spec.top_k,
        TOP_KP=power_of_two(spec.top_k),
        HAS_DROP=rule.drop_share is not None,
        RENORMALISE=spec.renormalise,
        HAS_EXPERT_SCALE=scale_E is not None,
        **sizes,
        num_warps=4,
    )


def _checked(scores: RouterScores, spec: RouterSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Choice, affinity and live, laid out as the kernels read them."""
    choice, affinity, live = scores.choice_GLE.detach(), scores.affinity_GLE.detach(), scores.live_GL
    check_devices(choice, affinity, live)
    if (choice.dtype, affinity.dtype, live.dtype) != (torch.float32, torch.float32, torch.bool):
        raise ConfigError(
            "selection expects choice and affinity in float32 and live in bool, got "
            f"{choice.dtype}, {affinity.dtype} and {live.dtype}."
        )
    if choice.shape[-1] != spec.num_experts or spec.num_experts > MOST_EXPERTS:
        raise ConfigError(
            f"selection expects scores of {spec.num_experts} experts, at most {MOST_EXPERTS}, got {choice.shape[-1]}."
        )
    return choice.contiguous(), affinity.expand(choice.shape).contiguous(), live.expand(choice.shape[:2]).contiguous()


def _reach(spec: RouterSpec, group_limit: GroupLimit) -> tuple[int, int]:
    """Expert groups, and how many of them a token may reach: one of one where there is no limit."""
    limited = group_limit == "inside" and spec.kept_groups < spec.num_groups
    return (spec.num_groups, spec.kept_groups) if limited else (1, 1)


def _lanes(num_experts: int, reach: tuple[int, int], length: int, *, most_tokens: int) -> dict[str, int]:
    """How experts lie in lanes, and how many tokens a program takes at a time."""
    num_groups, kept = reach
    shape = {"NGP": power_of_two(num_groups), "GSP": power_of_two(num_experts // num_groups)}
    at_a_time = max(1, LANES_AT_A_TIME // (shape["NGP"] * shape["GSP"]))
    tokens = min(at_a_time, most_tokens, power_of_two(max(1, length)))
    return {"NUM_GROUPS": num_groups, "KEPT": kept, **shape, "TOKENS": tokens}


def _bits(number: float) -> int:
    """The float64, as the integer with the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
