"""A layer's routing in one call of the native library: scores, coreset, plan and counts (csrc/routing_step.h)."""

from __future__ import annotations

import weakref
from ctypes import CDLL, Structure, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from expertshare import native
from expertshare.config import GroupLimit, RouterSpec
from expertshare.errors import ConfigError
from expertshare.routing import SharingRule, route_layer, runs_on_torch
from expertshare.routing.route import routed
from expertshare.types import Coreset, Routed, RouterScores, RoutingPlan, RoutingPolicy

MOST_TOKENS = 1024
"""Tokens of a sharing group that fit the library's scratch."""
MOST_SLOTS = 64
"""Experts per token that do."""

_RANKINGS = {"all": 0, "votes": 1, "highest": 2}


def route_layer_cpu(
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
    """`route_layer` by the native library: from equal scores the same coresets, experts and counts, to the bit.

    Training, tensors that the library does not take, and a policy that no rule expresses are left to torch; the router
    scores are then still the library's, where it takes them (`router_scores_cpu`).
    """
    prepared = _prepared_for(weight_ED, bias_E, policy, spec)
    found = prepared.route(x_GLD, live_GL, previous)
    if found is not None:
        return found
    if takes(x_GLD, weight_ED, bias_E):
        scores = replace(router_scores_cpu(x_GLD, weight_ED, bias_E, live_GL, spec), masked_GL=masked_GL)
        return routed(scores, policy, spec, previous)
    return route_layer(x_GLD, weight_ED, bias_E, policy, spec, live_GL, masked_GL=masked_GL, previous=previous)


class _Gate(Structure):
    """es_gate of csrc/affinity.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "w", "bias", "affinity", "choice")),
        *((name, c_int64) for name in ("num_tokens", "depth", "num_experts")),
        *((name, c_int32) for name in ("is_bfloat16", "w_is_bfloat16", "is_softmax")),
        *native.HOW,
    )


class _Rule(Structure):
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
        ("gate", _Gate),
        ("rule", _Rule),
        *((name, c_void_p) for name in ("live", "coreset", "ids", "weights", "active", "load", "unique")),
        *((name, c_int64) for name in ("groups", "length", "top_k")),
        ("scaling", c_float),
        ("renormalise", c_int32),
    )


def reach_limit(spec: RouterSpec, group_limit: GroupLimit) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may reach: one of one where there is no limit."""
    limited = group_limit == "inside" and spec.kept_groups < spec.num_groups
    return (spec.num_groups, spec.kept_groups) if limited else (1, 1)


def _in_numbers(rule: SharingRule, spec: RouterSpec) -> _Rule | None:
    if rule.ranking not in _RANKINGS or rule.voters != "all" or rule.reuse != 1:
        return None
    if (rule.protected and rule.prefix_share is not None) or None not in (rule.experts_per_token, rule.drop_share):
        return None
    return _Rule(
        rule.size,
        rule.protected,
        -1.0 if rule.prefix_share is None else rule.prefix_share,
        -1.0 if rule.drop_share is None else rule.drop_share,
        spec.top_k if rule.experts_per_token is None else rule.experts_per_token,
        _RANKINGS[rule.ranking],
        int(rule.keep_protected or rule.prefix_share is not None),
        *reach_limit(spec, "inside" if rule.ballots == "grouped" else "ignore"),
        *reach_limit(spec, rule.group_limit),
    )


class _Prepared:
    """What stays the same from one routing of a layer to the next, as the library reads it.

    Between two of them the experts have passed through the caches: every line of Python and every object that is
    touched here comes from memory again, so all that can be known beforehand is.
    """

    __slots__ = ("bias", "constants", "depth", "dtype", "num_experts", "policy", "spec", "top_k", "weight")

    def __init__(self, weight_ED: Tensor, bias_E: Tensor | None, policy: RoutingPolicy, spec: RouterSpec) -> None:
        self.weight, self.dtype = weakref.ref(weight_ED), weight_ED.dtype
        self.bias = None if bias_E is None else (weakref.ref(bias_E), bias_E.data_ptr())
        self.policy, self.spec = policy, spec
        self.depth, self.num_experts, self.top_k = weight_ED.shape[1], spec.num_experts, spec.top_k
        self.constants = self._constants(weight_ED, bias_E)

    def _constants(self, weight_ED: Tensor, bias_E: Tensor | None) -> bytes | None:
        """An es_step without what changes from call to call; None where the layer is not for the library."""
        spec = self.spec
        fits = len(weight_ED) == spec.num_experts and (bias_E is None or bias_E.shape == (spec.num_experts,))
        if runs_on_torch(self.policy) or spec.top_k > MOST_SLOTS or not (fits and _takes_weights(weight_ED, bias_E)):
            return None
        numbers = _in_numbers(self.policy.rule(spec), spec)
        if numbers is None:
            return None
        step = _Step(_gate(weight_ED, bias_E, spec), numbers)
        step.top_k, step.scaling, step.renormalise = spec.top_k, spec.scaling, int(spec.renormalise)
        return bytes(step)

    def is_for(self, weight_ED: Tensor, bias_E: Tensor | None, policy: RoutingPolicy, spec: RouterSpec) -> bool:
        """Whether this was made of these, and they lie at the same addresses."""
        if policy is not self.policy or spec is not self.spec or self.weight() is not weight_ED:
            return False
        if weight_ED.dtype is not self.dtype:
            return False
        if bias_E is None or self.bias is None:
            return bias_E is None and self.bias is None
        reference, address = self.bias
        return reference() is bias_E and bias_E.data_ptr() == address

    def route(self, x_GLD: Tensor, live_GL: Tensor, previous: Coreset | None) -> Routed | None:
        """The layer's routing; None for what is left to torch."""
        groups, length, depth = x_GLD.shape
        if (
            self.constants is None
            or x_GLD.dtype not in (torch.bfloat16, torch.float32)
            or live_GL.dtype is not torch.bool
            or not (x_GLD.is_cpu and live_GL.is_cpu)
            or depth != self.depth
            or length > MOST_TOKENS
            or live_GL.shape != (groups, length)
            or previous is not None
            or (torch.is_grad_enabled() and self._has_gradients(x_GLD))
            or torch.compiler.is_compiling()
        ):
            return None
        library = _library()
        x_GLD, live_GL = x_GLD.contiguous(), live_GL.contiguous()
        new = plan_buffers(groups * length, self.top_k, self.num_experts, groups)
        call = (
            self.constants,
            x_GLD.data_ptr(),
            live_GL.data_ptr(),
            None,
            *new.addresses,
            groups,
            length,
            x_GLD.dtype is torch.bfloat16,
            *native.crew(),
        )
        status = library.es_route(*call, -1)
        if status == native.ISA_NAMED:
            status = library.es_route(*call, native.isa_number())
        _check_status(status)
        return Routed(RoutingPlan(new.ids_TK, new.weights_TK, new.active_E), new.load_E, new.unique_G, None)

    def _has_gradients(self, x_GLD: Tensor) -> bool:
        weight_ED, bias_E = self.weight(), None if self.bias is None else self.bias[0]()
        return any(tensor is not None and tensor.requires_grad for tensor in (x_GLD, weight_ED, bias_E))


_MOST_LAYERS, _MOST_POLICIES = 1024, 16
_layers: dict[int, list[_Prepared]] = {}
"""By the address of a router's weights: what was prepared for the policies that came last."""


def _prepared_for(weight_ED: Tensor, bias_E: Tensor | None, policy: RoutingPolicy, spec: RouterSpec) -> _Prepared:
    address = weight_ED.data_ptr()
    of_layer = _layers.get(address, [])
    for prepared in of_layer:
        if prepared.is_for(weight_ED, bias_E, policy, spec):
            return prepared
    made = _Prepared(weight_ED, bias_E, policy, spec)
    if address not in _layers and len(_layers) >= _MOST_LAYERS:
        _layers.clear()
    still = [prepared for prepared in of_layer if prepared.weight() is weight_ED]
    _layers[address] = [made, *still[: _MOST_POLICIES - 1]]
    return made


@cache
def _library() -> CDLL:
    library = native.library()
    library.es_route.argtypes = [*[c_void_p] * 9, c_int64, c_int64, c_int, c_int, c_void_p, c_int]
    return library


def takes(x_GLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> bool:
    """Whether the library is there and can compute with these: floats, no gradients, all on the CPU."""
    others = (weight_ED,) if bias_E is None else (weight_ED, bias_E)
    return (
        x_GLD.dtype in (torch.float32, torch.bfloat16)
        and x_GLD.is_cpu
        and _takes_weights(weight_ED, bias_E)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_GLD, *others)))
        and not torch.compiler.is_compiling()
    )


def _takes_weights(weight_ED: Tensor, bias_E: Tensor | None) -> bool:
    fits = weight_ED.dtype in (torch.float32, torch.bfloat16) and weight_ED.is_cpu and weight_ED.is_contiguous()
    if bias_E is not None:
        fits = fits and bias_E.dtype == torch.float32 and bias_E.is_cpu and bias_E.is_contiguous()
    return native.available() and fits


def router_scores_cpu(
    x_GLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, live_GL: Tensor, spec: RouterSpec
) -> RouterScores:
    """`router_scores` of x times the router's weights, for tensors that `takes` accepts.

    x_GLD, weight_ED: float32 or bfloat16, widened exactly. bias_E: float32. Products and sums are float32: within a few
    units in the last place of torch's, and other ones with another instruction set, but the same for a token whatever
    tokens stand beside it and in however many threads. A logit below -87 counts as -87 (an affinity of 2e-38).
    """
    x_GLD = x_GLD.contiguous()
    affinity_GLE = torch.empty((*x_GLD.shape[:2], len(weight_ED)))
    choice_GLE = affinity_GLE if bias_E is None else torch.empty_like(affinity_GLE)
    gate = _gate(weight_ED, bias_E, spec)
    gate.x, gate.is_bfloat16 = x_GLD.data_ptr(), int(x_GLD.dtype == torch.bfloat16)
    gate.num_tokens = x_GLD.shape[0] * x_GLD.shape[1]
    gate.affinity = affinity_GLE.data_ptr()
    gate.choice = None if bias_E is None else choice_GLE.data_ptr()
    _check_status(native.status_of("es_affinity", gate))
    return RouterScores(affinity_GLE, choice_GLE, live_GL)


def _gate(weight_ED: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> _Gate:
    """The part of the gate, as the library reads it, that stays the same for a layer."""
    gate = _Gate()
    gate.w, gate.w_is_bfloat16 = weight_ED.data_ptr(), int(weight_ED.dtype == torch.bfloat16)
    gate.bias = None if bias_E is None else bias_E.data_ptr()
    gate.num_experts, gate.depth = weight_ED.shape
    gate.is_softmax = int(spec.activation == "softmax")
    return gate


def _check_status(status: int) -> None:
    """Raise ConfigError unless the library could do what was asked."""
    if status != 0:
        raise ConfigError(
            "the router's gate could not get its memory or its threads: pass fewer tokens at a time, or set fewer "
            "threads with set_num_threads."
        )


class PlanBuffers(NamedTuple):
    """Uninitialised memory for a plan and its counts, and the addresses, in this order.

    ids_TK: int64. weights_TK: float32. active_E: bool. load_E: int64. unique_G: int64.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    active_E: Tensor
    load_E: Tensor
    unique_G: Tensor
    addresses: tuple[int, ...]


_MOST_PLANS, _MOST_PLAN_TOKENS, _MOST_KINDS = 32, 1024, 64
_unused: dict[tuple[int, int, int, int, bool], list[PlanBuffers]] = {}


def plan_buffers(tokens: int, top_k: int, experts: int, groups: int) -> PlanBuffers:
    """Buffers that nobody has had before: no element is shared with others, but a piece of memory is with a few.

    They are made for many plans at a time: between two routings the experts flush the caches, and five tensors that are
    made with cold ones take ten microseconds, a tenth of a routing step (docs/performance.md).
    """
    kind = (tokens, top_k, experts, groups, torch.is_inference_mode_enabled())
    try:
        return _unused[kind].pop()
    except (KeyError, IndexError):
        made = _several(*kind[:4])
    first = made.pop()
    if len(_unused) >= _MOST_KINDS:
        _unused.clear()
    _unused[kind] = made  # another thread may have been here: its rest goes
    return first


def _several(tokens: int, top_k: int, experts: int, groups: int) -> list[PlanBuffers]:
    count = max(1, min(_MOST_PLANS, _MOST_PLAN_TOKENS // max(1, tokens)))
    parts = (
        ((count, tokens, top_k), torch.int64),
        ((count, tokens, top_k), torch.float32),
        ((count, experts), torch.bool),
        ((count, experts), torch.int64),
        ((count, groups), torch.int64),
    )
    ids, weights, active, load, unique = (
        torch.empty(shape, dtype=dtype, device="cpu").unbind() for shape, dtype in parts
    )
    each = zip(ids, weights, active, load, unique, strict=True)
    return [PlanBuffers(*tensors, addresses=tuple(tensor.data_ptr() for tensor in tensors)) for tensors in each]
