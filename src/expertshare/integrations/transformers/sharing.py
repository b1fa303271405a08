"""One layer's routing under a policy: the router's own choice where that stands, else the plan's, put in by hooks; and
whether a router does what its interface promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertshare.errors import ConfigError, InputError
from expertshare.integrations.transformers.calls import Call, read_call
from expertshare.integrations.transformers.sites import RouterRule, RouterSite
from expertshare.routing import RoutingPolicy, make_policy, route
from expertshare.routing.ranking import top_k_ids


@dataclass(frozen=True, slots=True)
class SharedChoice:
    """What tokens run. own_T: bool, tokens whose own choice stands, whatever the router computed for them.

    ids_TK: int64, -1 in unused slots; weights_TK: float32, 0 there; both are the plan's, also where own_T is True.
    run_TK: the ids that are run, the router's own where own_T is True. active_E: bool, their union.
    """

    own_T: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    run_TK: Tensor
    active_E: Tensor


def share(
    rule: RouterRule, router: nn.Module, policy: RoutingPolicy, call: Call, first_TE: Tensor, own_ids_TK: Tensor
) -> SharedChoice:
    """Select and assign for the tokens of a call. first_TE: what the router has in the place of logits."""
    spec = rule.spec
    scores = rule.scores(router, call.grouped(first_TE, fill=0.0), call.live_groups())
    coreset, plan = route(scores, policy, spec, expert_scale_E=rule.expert_scale_of(router))
    ids_TK, weights_TK = call.flat(plan.expert_ids_TK), call.flat(plan.weights_TK)
    member_TE = call.per_token(coreset.member_GE)
    own_T = _unchanged(rule, policy, ids_TK, own_ids_TK, member_TE)
    live_T = call.live_BS.flatten()
    nothing_changed = (own_T | ~live_T).all()
    own_T = torch.where(live_T, own_T, member_TE.all(dim=-1) & nothing_changed)
    run_TK = torch.where(own_T.unsqueeze(-1), own_ids_TK, ids_TK)
    return SharedChoice(own_T, ids_TK, weights_TK, run_TK, _used(run_TK, spec.num_experts).any(dim=0))


def _unchanged(
    rule: RouterRule, policy: RoutingPolicy, ids_TK: Tensor, own_ids_TK: Tensor, member_TE: Tensor
) -> Tensor:
    """Tokens whose own experts are all in the coreset, and that are to run all of them: bool [T].

    Without expert groups their own K best are then the K best inside; how a tie is broken stays the router's affair.
    With groups the coreset changes which groups win, unless it is whole, so the ids decide.
    """
    complete_T = (ids_TK >= 0).all(dim=-1)
    inside_T = member_TE.gather(-1, own_ids_TK).all(dim=-1)
    if rule.spec.kept_groups < rule.spec.num_groups:
        same_T = (ids_TK.sort(dim=-1).values == own_ids_TK.sort(dim=-1).values).all(dim=-1)
        whole_T = member_TE.all(dim=-1) & (policy.group_limit == "inside")
        inside_T = inside_T & (whole_T | same_T)
    return complete_T & inside_T


def _used(ids_TK: Tensor, num_experts: int) -> Tensor:
    """bool [T, E]."""
    used = torch.zeros(len(ids_TK), num_experts + 1, dtype=torch.bool, device=ids_TK.device)
    return used.scatter_(-1, ids_TK + 1, True)[:, 1:]


def filled(choice: SharedChoice, num_experts: int, *, distinct: bool) -> Tensor:
    """run_TK with an expert in every slot, for code that knows no unused ones; the weights there are 0.

    An unused slot repeats an expert of its token (padding: one that is run anyway), so that no expert is added.
    distinct: never twice the same in a token, for remote code that counts a token's experts by setting bits; it may
    then have to name experts that no other token runs.
    """
    unused_TK = choice.run_TK < 0
    if not distinct:
        anyone = choice.active_E.to(torch.uint8).argmax()
        best_T1 = choice.run_TK.max(dim=-1, keepdim=True).values
        return torch.where(unused_TK, torch.where(best_T1 < 0, anyone, best_T1), choice.run_TK)
    taken_TE = _used(choice.run_TK, num_experts)
    preference_TE = (1.0 + choice.active_E.float()).expand_as(taken_TE).masked_fill(taken_TE, 0.0)
    spare_TK = top_k_ids(preference_TE, choice.run_TK.shape[-1])
    rank_TK = (unused_TK.cumsum(dim=-1) - 1).clamp_min(0)
    return torch.where(unused_TK, spare_TK.gather(-1, rank_TK), choice.run_TK)


def restricted_logits(choice: SharedChoice, logits_TE: Tensor) -> Tensor:
    """Logits of which a softmax and top-k choose what the plan says; the tokens' own where own_T is True.

    All others have the probability 0, except those that are run anyway: theirs is 1e-35, which no sum notices but a
    ranking does, so that unused slots add no expert.
    """
    chosen_TE = _used(choice.ids_TK, logits_TE.shape[-1])
    least_T1 = logits_TE.masked_fill(~chosen_TE, float("inf")).amin(dim=-1, keepdim=True)
    most_T1 = logits_TE.masked_fill(~chosen_TE, float("-inf")).amax(dim=-1, keepdim=True)
    below_T1 = torch.minimum(least_T1 - 10.0, most_T1 - 80.0)
    below_T1 = below_T1.masked_fill(below_T1.isinf(), 0.0)  # padding has chosen none
    below_TE = torch.where(choice.active_E, below_T1, below_T1 - 1000.0)
    keep_TE = chosen_TE | choice.own_T.unsqueeze(-1)
    return torch.where(keep_TE, logits_TE, below_TE)


def share_of_mass(rule: RouterRule, choice: SharedChoice) -> Tensor:
    """What the output of a block over `restricted_logits` is to be multiplied with, float32 [T]; 1 where own_T is True.

    The softmax over restricted logits sums to 1 over the plan's experts, but the model's rule weighs them by their
    probability among all experts unless it renormalises.
    """
    mass_T = choice.weights_TK.sum(dim=-1)
    if rule.spec.renormalise:
        mass_T = (mass_T > 0).float()
    return torch.where(choice.own_T, 1.0, mass_T)


Recorder = Callable[[int, Call, SharedChoice], None]
"""Hears of one forward of the layer at an index."""


class StackWatch:
    """Remembers how the tokens of the last call of one stack lie. It is kept after the call: gradient checkpointing
    runs layers again."""

    def __init__(self, stack: nn.Module, block_length: int | None) -> None:
        self.call: Call | None = None
        self._block_length = block_length
        self.removal = stack.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = read_call(stack, args, kwargs, self._block_length)


class RouterHook:
    """Replaces the output of one router. index: of its site; policy: bound to its rule; recorders: hear of calls."""

    def __init__(
        self, index: int, site: RouterSite, policy: RoutingPolicy, watch: StackWatch, recorders: list[Recorder]
    ) -> None:
        self._index, self._site, self._policy, self._watch, self._recorders = index, site, policy, watch, recorders
        self._mass_T: Tensor | None = None
        hook = self._on_logits if site.rule.output == "logits" else self._on_triple
        self.removals = [site.router.register_forward_hook(hook)]
        if site.rule.output == "logits":
            self.removals.append(site.block.register_forward_hook(self._on_block))

    def _on_triple(self, _router: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        rule = self._site.rule
        logits_TE, weights_TK, own_ids_TK = rule.ordered(output)
        choice = self._share(logits_TE, own_ids_TK)
        ids_TK = filled(choice, rule.spec.num_experts, distinct=self._site.separate_experts)
        own_T1 = choice.own_T.unsqueeze(-1)
        shared_TK = torch.where(own_T1, weights_TK, choice.weights_TK.to(weights_TK.dtype))
        return rule.ordered((logits_TE, shared_TK, ids_TK))

    def _on_logits(self, _router: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        rule = self._site.rule
        logits_TE = output.reshape(-1, output.shape[-1])
        own_ids_TK = logits_TE.float().softmax(dim=-1).topk(rule.spec.top_k, dim=-1).indices
        choice = self._share(logits_TE, own_ids_TK)
        self._mass_T = share_of_mass(rule, choice)
        return restricted_logits(choice, logits_TE).reshape(output.shape)

    def _on_block(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Back from the softmax over the restricted logits to the model's own weights."""
        assert self._mass_T is not None
        hidden = output[0] if isinstance(output, tuple) else output
        scaled = hidden * self._mass_T.to(hidden.dtype).reshape(*hidden.shape[:-1], 1)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    def _share(self, logits_TE: Tensor, own_ids_TK: Tensor) -> SharedChoice:
        call = self._watch.call
        if call is None or call.live_BS.numel() != len(logits_TE):
            known = "no call" if call is None else f"a call with {tuple(call.live_BS.shape)} positions"
            raise InputError(
                f"expected the router {self._site.name} to be called by its model with every position, got "
                f"{len(logits_TE)} tokens after {known}: call the whole model, or remove the policy first."
            )
        choice = share(self._site.rule, self._site.router, self._policy, call, logits_TE, own_ids_TK)
        for record in self._recorders:
            record(self._index, call, choice)
        return choice


TOKENS = 8
TOLERANCE = 0.05
"""Relative to the largest value: bfloat16 rounds by 0.4 %, a wrong rule is off by far more."""


def verify(site: RouterSite) -> None:
    """Raises ConfigError unless vanilla routing by the site's rule is what the model computes, on random tokens."""
    weight = next(p for p in site.router.parameters() if p.dim() == 2)
    generator = torch.Generator().manual_seed(0)
    probe_TD = torch.randn(TOKENS, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        verified = _block_agrees(site, probe_TD) if site.rule.output == "logits" else _router_agrees(site, probe_TD)
    if not verified:
        spec = site.rule.spec
        normalised = "renormalised" if spec.renormalise else "not renormalised"
        raise ConfigError(
            f"expected {site.name} ({type(site.router).__name__} in {type(site.block).__name__}) to route as its "
            f"interface says, {spec.activation}, top {spec.top_k} of {spec.num_experts}, {normalised}, got another "
            "result on random tokens: its rule is not supported."
        )


def _most_agree(ours_TX: Tensor, theirs_TX: Tensor) -> bool:
    close_T = (ours_TX - theirs_TX).abs().amax(dim=-1) <= TOLERANCE * theirs_TX.abs().amax(dim=-1)
    return int(close_T.sum()) * 2 > TOKENS


def _vanilla(site: RouterSite, logits_TE: Tensor, own_ids_TK: Tensor) -> SharedChoice:
    call = Call(torch.ones(1, TOKENS, dtype=torch.bool, device=logits_TE.device), TOKENS)
    return share(site.rule, site.router, make_policy("vanilla"), call, logits_TE, own_ids_TK)


def _router_agrees(site: RouterSite, probe_TD: Tensor) -> bool:
    """Ids may differ where scores tie, so most tokens must agree, and these in their weights."""
    output = site.router(probe_TD)
    if not _is_triple(output, site.rule):
        return False
    logits_TE, weights_TK, ids_TK = site.rule.ordered(output)
    choice = _vanilla(site, logits_TE, ids_TK)
    ours_TE, theirs_TE = (
        torch.zeros(TOKENS, site.rule.spec.num_experts).scatter_(-1, ids.cpu(), weights.float().cpu())
        for ids, weights in ((choice.ids_TK, choice.weights_TK), (ids_TK, weights_TK))
    )
    return _most_agree(ours_TE, theirs_TE)


def _is_triple(output: Any, rule: RouterRule) -> bool:
    if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(part, Tensor) for part in output)):
        return False
    shapes, chosen = [part.shape for part in rule.ordered(output)], (TOKENS, rule.spec.top_k)
    ids = rule.ordered(output)[-1]
    return shapes == [(TOKENS, rule.spec.num_experts), chosen, chosen] and ids.dtype == torch.int64


def _block_agrees(site: RouterSite, probe_TD: Tensor) -> bool:
    """The whole block against the formula: no shared expert, no other activation of the router, no extra factor."""
    experts = site.experts
    if not isinstance(experts, nn.ModuleList) or len(experts) != site.rule.spec.num_experts:
        return False
    output = site.block(probe_TD.unsqueeze(0))
    theirs_TD = (output[0] if isinstance(output, tuple) else output).reshape(TOKENS, -1).float()
    logits_TE = site.router(probe_TD)
    choice = _vanilla(site, logits_TE, logits_TE.topk(site.rule.spec.top_k).indices)
    ours_TD = torch.zeros_like(theirs_TD)
    for token in range(TOKENS):
        for expert, weight in zip(choice.ids_TK[token].tolist(), choice.weights_TK[token], strict=True):
            ours_TD[token] += weight * experts[expert](probe_TD[token : token + 1])[0].float()
    return _most_agree(ours_TD, theirs_TD)
