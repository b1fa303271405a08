"""A layer's routing in one call of the native library: gate, select, assign and count, for policies with a recipe."""

from __future__ import annotations

from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from expertshare import native
from expertshare.config import GroupLimit, RouterSpec
from expertshare.routing import compiled
from expertshare.routing.assign import reach_limit
from expertshare.routing.blanks import blank
from expertshare.routing.gate import Gate, check_status, gate_of_weights, weights_are_taken
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


Routed = tuple[RoutingPlan, Tensor, Tensor]


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


@dataclass(frozen=True, slots=True)
class LayerStep:
    """What stays the same from one routing of a layer to the next, as the library reads it.

    Between two of them the experts have passed through the caches: every line of Python and every object that is
    touched here comes from memory again, so all that can be known beforehand is. constants: an es_step, None where the
    layer is not for the library; it is good as long as `is_of` says so.
    """

    weight_ED: Tensor
    bias_E: Tensor | None
    policy: RoutingPolicy
    spec: RouterSpec
    dtype: torch.dtype
    addresses: tuple[int, int | None]
    constants: bytes | None

    @classmethod
    def of(cls, weight_ED: Tensor, bias_E: Tensor | None, policy: RoutingPolicy, spec: RouterSpec) -> LayerStep:
        """Prepare. The library takes a layer that `gate_takes` would, and policies with a recipe."""
        dtype, addresses = weight_ED.dtype, _addresses(weight_ED, bias_E)
        recipe = recipe_of(policy, spec)
        numbers = None if recipe is None else _in_numbers(recipe, spec, policy.group_limit)
        shapes = (spec.num_experts, *weight_ED.shape[1:]), (spec.num_experts,)
        fits = weight_ED.shape == shapes[0] and (bias_E is None or bias_E.shape == shapes[1])
        if numbers is None or not fits or not weights_are_taken(weight_ED, bias_E):
            return cls(weight_ED, bias_E, policy, spec, dtype, addresses, None)
        step = _Step(gate_of_weights(weight_ED, bias_E, spec), numbers)
        step.top_k, step.scaling, step.renormalise = spec.top_k, spec.scaling, int(spec.renormalise)
        return cls(weight_ED, bias_E, policy, spec, dtype, addresses, bytes(step))

    def is_of(self, weight_ED: Tensor, bias_E: Tensor | None, policy: RoutingPolicy, spec: RouterSpec) -> bool:
        """Whether this was made of these, and they lie where they lay."""
        return (
            weight_ED is self.weight_ED
            and bias_E is self.bias_E
            and policy is self.policy
            and spec is self.spec
            and _addresses(weight_ED, bias_E) == self.addresses
            and weight_ED.dtype is self.dtype
        )

    def route(self, x_GLD: Tensor, live_GL: Tensor, *, coreset_GE: Tensor | None = None) -> Routed | None:
        """`gate_scores`, `route` and `count_load` in one, to the same bits: the plan, pairs per expert, unique experts.

        None where `gate_takes` would refuse, or the library has no room for so long a group. coreset_GE: bool [G, E],
        contiguous, where the coreset is wanted too: written in full.
        """
        groups, length, depth = x_GLD.shape
        if (
            self.constants is None
            or x_GLD.dtype not in (torch.bfloat16, torch.float32)
            or live_GL.dtype is not torch.bool
            or not (x_GLD.is_cpu and live_GL.is_cpu)
            or depth != self.weight_ED.shape[1]
            or length > MOST_TOKENS
            or live_GL.shape != (groups, length)
            or (torch.is_grad_enabled() and self._has_gradients(x_GLD))
            or torch.compiler.is_compiling()
        ):
            return None
        library = compiled.declared()
        x_GLD, live_GL = x_GLD.contiguous(), live_GL.contiguous()
        spec = self.spec
        new = blank(groups * length, spec.top_k, spec.num_experts, groups)
        call = (
            self.constants,
            x_GLD.data_ptr(),
            live_GL.data_ptr(),
            None if coreset_GE is None else coreset_GE.data_ptr(),
            *new.addresses,
            groups,
            length,
            x_GLD.dtype is torch.bfloat16,
            *native.crew(),
        )
        status = library.es_route(*call, -1)
        if status == native.ISA_NAMED:
            status = library.es_route(*call, native.isa_number())
        check_status(status)
        return RoutingPlan(new.ids_TK, new.weights_TK, new.active_E), new.load_E, new.unique_G

    def _has_gradients(self, x_GLD: Tensor) -> bool:
        bias_E = self.bias_E
        return x_GLD.requires_grad or self.weight_ED.requires_grad or (bias_E is not None and bias_E.requires_grad)


def _addresses(weight_ED: Tensor, bias_E: Tensor | None) -> tuple[int, int | None]:
    return weight_ED.data_ptr(), None if bias_E is None else bias_E.data_ptr()
