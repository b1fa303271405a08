"""Expert sharing on the GPU: scores to coreset to plan in two kernels, without a word to the host."""

from __future__ import annotations

import struct
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.errors import ConfigError
from expertshare.kernels.triton import check_devices, power_of_two
from expertshare.routing import RoutingPolicy, SharingRule, route_layer, router_scores, runs_on_torch
from expertshare.routing.rule import RANKINGS, expert_groups
from expertshare.types import Coreset, Routed, RouterScores, RoutingPlan

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
    choice, affinity, live = given = _checked(scores, spec)
    groups, length, num_experts = choice.shape
    slots = groups * length, spec.top_k

    def new(shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=choice.device)

    plan = RoutingPlan(new(slots), new(slots, torch.float32), new((num_experts,), torch.bool))
    member_GE, load_E, unique_G = new((groups, num_experts), torch.bool), new((num_experts,)), new((groups,))
    found = Routed(plan, load_E, unique_G, Coreset(member_GE))
    if groups == 0:
        plan.active_E.zero_()
        load_E.zero_()
        return found
    from expertshare.kernels.triton.device.route import coreset_kernel, plan_kernel

    used_GE = new((groups, num_experts), torch.int32)  # marks of the experts that each group has used
    masked_GL = scores.masked_GL if rule.voters == "masked" else None
    voters_GL = live if masked_GL is None else masked_GL.expand(live.shape).contiguous()
    sizes = _lanes(num_experts, expert_groups(spec, rule.ballots == "grouped"), length, most_tokens=16)
    lanes = sizes["NGP"] * sizes["GSP"]
    kept_GE = live if previous is None else previous.member_GE.contiguous()
    scratch = new((groups, lanes)), new((groups, length * (rule.ranking == "coverage"), lanes + 1), torch.float64)
    coreset_kernel[(groups,)](
        *given,
        voters_GL,
        kept_GE,
        member_GE,
        *scratch,
        used_GE,
        unique_G,
        plan.active_E,
        load_E,
        length,
        rule.size,
        _bits(rule.prefix_share or 0.0),
        _bits(rule.saturation or 0.0),
        NUM_EXPERTS=num_experts,
        TOP_K=spec.top_k,
        RANKING=RANKINGS.index(rule.ranking),
        FRONT=min(rule.protected, spec.top_k),
        WHOLE_FRONT=rule.keep_protected,
        HAS_SHARE=rule.prefix_share is not None,
        ONLY_MASKED=masked_GL is not None,
        HAS_PREVIOUS=previous is not None,
        KEYS_AT_A_TIME=min(16, lanes),
        **sizes,
        num_warps=8,
    )
    sizes = _lanes(num_experts, expert_groups(spec, rule.group_limit == "inside"), length, most_tokens=4)
    scale_E = affinity if expert_scale_E is None else expert_scale_E.float().contiguous()
    kept_slots = spec.top_k if rule.experts_per_token is None else rule.experts_per_token
    plan_kernel[(groups, -(-length // sizes["TOKENS"]))](
        *given,
        member_GE,
        scale_E,
        plan.expert_ids_TK,
        plan.weights_TK,
        plan.active_E,
        load_E,
        used_GE,
        unique_G,
        length,
        kept_slots,
        _bits(rule.drop_share or 0.0),
        float(spec.scaling),
        NUM_EXPERTS=num_experts,
        TOP_K=spec.top_k,
        TOP_KP=power_of_two(spec.top_k),
        HAS_DROP=rule.drop_share is not None,
        RENORMALISE=spec.renormalise,
        HAS_EXPERT_SCALE=expert_scale_E is not None,
        **sizes,
        num_warps=4,
    )
    return found


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
