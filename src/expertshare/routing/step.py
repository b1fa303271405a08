"""A layer's routing in one call of the native library: gate, select, assign and count, for policies with a recipe."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from expertshare.config import GroupLimit, RouterSpec
from expertshare.routing import compiled
from expertshare.routing.assign import reach_limit
from expertshare.routing.gate import Gate, check_status, describe
from expertshare.routing.gate import takes as gate_takes
from expertshare.routing.recipe import Recipe, recipe_of
from expertshare.types import RoutingPlan, RoutingPolicy

MOST_TOKENS = 1024
"""Tokens of a sharing group that fit the library's scratch."""

_RANKINGS = {"all": 0, "votes": 1, "highest": 2}


class _Recipe(Structure):
    """es_recipe of csrc/routing_step.h, field by field."""

    _fields_ = (
        *((name, c_int64) for name in ("size", "num_firsts")),
        *((name, c_double) for name in ("prefix_share", "drop_share")),
        ("most_slots", c_int64),
        *((name, c_int32) for name in ("ranking", "front_is_whole", "ballot_groups", "ballot_kept_groups")),
        *((name, c_int32) for name in ("expert_groups", "kept_groups")),
    )


class _Step(Structure):
    """es_step of csrc/routing_step.h, field by field."""

    _fields_ = (
        ("gate", Gate),
        ("recipe", _Recipe),
        *((name, c_void_p) for name in ("live", "coreset", "ids", "weights", "active", "load", "unique")),
        *((name, c_int64) for name in ("groups", "length", "top_k")),
        ("scaling", c_float),
        ("renormalise", c_int32),
    )


@dataclass(frozen=True, slots=True)
class RoutedLayer:
    """The plan of a layer and what `count_load` says of it: pairs per expert, unique experts per group (int64)."""

    plan: RoutingPlan
    load_E: Tensor
    unique_G: Tensor


@lru_cache(maxsize=256)
def _in_numbers(recipe: Recipe, spec: RouterSpec, group_limit: GroupLimit) -> _Recipe | None:
    """None for what the library could not follow: the knobs of a policy that was never bound may be out of range."""
    shares = (recipe.prefix_share, recipe.drop_share)
    counts = (recipe.num_firsts, 0 if recipe.slots is None else recipe.slots)
    least_size = 0 if recipe.ranking == "all" else 1
    if not least_size <= recipe.size <= spec.num_experts or min(counts) < 0 or spec.top_k > compiled.MOST_SLOTS:
        return None
    if any(share is not None and not share >= 0.0 for share in shares):
        return None
    ballot_limit: GroupLimit = "inside" if recipe.ballots == "grouped" else "ignore"
    return _Recipe(
        recipe.size,
        recipe.num_firsts,
        -1.0 if recipe.prefix_share is None else recipe.prefix_share,
        -1.0 if recipe.drop_share is None else recipe.drop_share,
        spec.top_k if recipe.slots is None else recipe.slots,
        _RANKINGS[recipe.ranking],
        int(recipe.front_is_whole),
        *reach_limit(spec, ballot_limit),
        *reach_limit(spec, group_limit),
    )


def route_layer(
    x_GLD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    live_GL: Tensor,
    policy: RoutingPolicy,
    spec: RouterSpec,
    *,
    coreset_GE: Tensor | None = None,
) -> RoutedLayer | None:
    """`gate_scores`, `route` and `count_load` in one, to the same bits; None where it takes that many.

    It takes one where `gate_takes` the tensors and the policy has a recipe. coreset_GE: bool [G, E], contiguous, where
    the coreset is wanted too: written in full.
    """
    library = compiled.library_for(masks=(live_GL,))
    if library is None or not gate_takes(x_GLD, weight_ED, bias_E):
        return None
    recipe = recipe_of(policy, spec)
    numbers = None if recipe is None else _in_numbers(recipe, spec, policy.group_limit)
    groups, length, depth = x_GLD.shape
    sizes_fit = weight_ED.shape == (spec.num_experts, depth) and live_GL.shape == (groups, length)
    if numbers is None or not sizes_fit or length > MOST_TOKENS:
        return None
    library.es_route.argtypes = [POINTER(_Step)]
    x_GLD, live_GL = x_GLD.contiguous(), live_GL.contiguous()
    num_experts, tokens = spec.num_experts, groups * length
    ids_TK = torch.empty((tokens, spec.top_k), dtype=torch.int64)
    weights_TK = torch.empty((tokens, spec.top_k))
    active_E = torch.empty(num_experts, dtype=torch.bool)
    load_E = torch.empty(num_experts, dtype=torch.int64)
    unique_G = torch.empty(groups, dtype=torch.int64)
    step = _Step(
        describe(x_GLD, weight_ED, bias_E, spec),
        numbers,
        live_GL.data_ptr(),
        None if coreset_GE is None else coreset_GE.data_ptr(),
        ids_TK.data_ptr(),
        weights_TK.data_ptr(),
        active_E.data_ptr(),
        load_E.data_ptr(),
        unique_G.data_ptr(),
        groups,
        length,
        spec.top_k,
        spec.scaling,
        int(spec.renormalise),
    )
    check_status(library.es_route(byref(step)))
    return RoutedLayer(RoutingPlan(ids_TK, weights_TK, active_E), load_E, unique_G)
