"""Whether a router does what its interface promises: tried on random tokens before a policy is put in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expertshare.errors import ConfigError
from expertshare.integrations.transformers.calls import Call
from expertshare.integrations.transformers.sharing import SharedChoice, share
from expertshare.integrations.transformers.sites import RouterRule, RouterSite
from expertshare.routing import make_policy

TOKENS = 8
TOLERANCE = 0.05
"""Relative to the largest value: bfloat16 rounds by 0.4 %, a wrong rule is off by far more."""


def verify(site: RouterSite) -> None:
    """Raises ConfigError unless vanilla routing by the site's rule is what the model computes there."""
    probe_TD = _probe(site)
    with torch.no_grad():
        verified = _block_agrees(site, probe_TD) if site.rule.output == "logits" else _router_agrees(site, probe_TD)
    if not verified:
        raise ConfigError(
            f"expected {site.name} ({type(site.router).__name__} in {type(site.block).__name__}) to route as its "
            f"interface says, {_words(site.rule)}, got another result on random tokens: its rule is not supported."
        )


def _words(rule: RouterRule) -> str:
    spec = rule.spec
    normalised = "renormalised" if spec.renormalise else "not renormalised"
    return f"{spec.activation}, top {spec.top_k} of {spec.num_experts}, {normalised}"


def _probe(site: RouterSite) -> Tensor:
    weight = next(p for p in site.router.parameters() if p.dim() == 2)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)


def _vanilla(site: RouterSite, logits_TE: Tensor, own_ids_TK: Tensor) -> SharedChoice:
    call = Call(torch.ones(1, TOKENS, dtype=torch.bool, device=logits_TE.device), TOKENS)
    return share(site.rule, site.router, make_policy("vanilla"), call, logits_TE, own_ids_TK)


def _router_agrees(site: RouterSite, probe_TD: Tensor) -> bool:
    """Ids may differ where scores tie, so most tokens must agree, and these in their weights."""
    output = site.router(probe_TD)
    if not _is_triple(output, site.rule):
        return False
    logits_TE, weights_TK, ids_TK = site.rule.parted(output)
    choice = _vanilla(site, logits_TE, ids_TK)
    ours_TE, theirs_TE = (
        torch.zeros(TOKENS, site.rule.spec.num_experts).scatter_(-1, ids.cpu(), weights.float().cpu())
        for ids, weights in ((choice.ids_TK, choice.weights_TK), (ids_TK, weights_TK))
    )
    close_T = (ours_TE - theirs_TE).abs().amax(dim=-1) <= TOLERANCE * theirs_TE.abs().amax(dim=-1)
    return int(close_T.sum()) * 2 > TOKENS


def _is_triple(output: Any, rule: RouterRule) -> bool:
    if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(part, Tensor) for part in output)):
        return False
    logits, weights, ids = rule.parted(output)
    chosen = (TOKENS, rule.spec.top_k)
    fits = logits.shape == (TOKENS, rule.spec.num_experts) and weights.shape == chosen and ids.shape == chosen
    return fits and ids.dtype == torch.int64


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
    close_T = (ours_TD - theirs_TD).abs().amax(dim=-1) <= TOLERANCE * theirs_TD.abs().amax(dim=-1)
    return int(close_T.sum()) * 2 > TOKENS
