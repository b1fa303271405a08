"""A layer's routing in one call of the native library: scores, coreset, plan and counts (csrc/routing_step.h)."""

from __future__ import annotations

import struct
import weakref
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertshare import native
from expertshare.config import GroupLimit, RouterSpec
from expertshare.errors import ConfigError
from expertshare.native import calls
from expertshare.routing import RoutingPolicy, SharingRule, route_layer, runs_on_torch
from expertshare.routing.route import routed
from expertshare.types import Coreset, Routed, RouterScores, RoutingPlan

MOST_TOKENS = 1024
"""Tokens of a sharing group that fit the library's scratch."""
MOST_SLOTS = 64
"""Experts per token that do."""


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
    scores are then still the library's, where it takes them (`router_scores_cpu`). Raises ConfigError for masked_GL and
    previous of a shape or dtype that the library would read past.
    """
    prepared = _prepared_for(weight_ED, bias_E, policy, spec)
    found = prepared.route(x_GLD, bias_E, live_GL, masked_GL, previous)
    if found is not None:
        return found
    if takes(x_GLD, weight_ED, bias_E):
        scores = replace(router_scores_cpu(x_GLD, weight_ED, bias_E, live_GL, spec), masked_GL=masked_GL)
        return routed(scores, policy, spec, previous)
    return route_layer(x_GLD, weight_ED, bias_E, policy, spec, live_GL, masked_GL=masked_GL, previous=previous)


_RANKINGS = {"all": 0, "votes": 1, "highest": 2, "coverage": 3}
_CONSTANTS = struct.Struct("PP3q2i 2q3dq8if4x")  # the first part of es_step: w, bias, sizes, kinds, es_rule
_pack_step = struct.Struct(f"{_CONSTANTS.size}s12P2q3iP").pack


def _reach(spec: RouterSpec, group_limit: GroupLimit) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may reach: one of one where there is no limit."""
    limited = group_limit == "inside" and spec.kept_groups < spec.num_groups
    return (spec.num_groups, spec.kept_groups) if limited else (1, 1)


def _constants(weight_ED: Tensor, bias_E: Tensor | None, rule: SharingRule, spec: RouterSpec) -> bytes:
    """What stays the same for a layer, as es_step begins."""
    none = -1.0
    return _CONSTANTS.pack(
        weight_ED.data_ptr(),
        0 if bias_E is None else bias_E.data_ptr(),
        weight_ED.shape[1],
        len(weight_ED),
        spec.top_k,
        weight_ED.dtype is torch.bfloat16,
        spec.activation == "softmax",
        rule.size,
        rule.protected,
        none if rule.prefix_share is None else rule.prefix_share,
        none if rule.saturation is None else rule.saturation,
        none if rule.drop_share is None else rule.drop_share,
        spec.top_k if rule.experts_per_token is None else rule.experts_per_token,
        _RANKINGS[rule.ranking],
        rule.keep_protected,
        rule.voters == "masked",
        *_reach(spec, "inside" if rule.ballots == "grouped" else "ignore"),
        *_reach(spec, rule.group_limit),
        spec.renormalise,
        spec.scaling,
    )


class _Prepared:
    """What stays the same from one routing of a layer to the next, as the library reads it.

    Between two of them the experts have passed through the caches: every line of Python and every object that is
    touched here comes from memory again, so all that can be known beforehand is.
    """

    __slots__ = ("_bias", "constants", "depth", "dtype", "num_experts", "policy", "spec", "top_k", "weight", "writes")

    def __init__(self, weight_ED: Tensor, bias_E: Tensor | None, policy: RoutingPolicy, spec: RouterSpec) -> None:
        self.weight, self.dtype = weakref.ref(weight_ED), weight_ED.dtype
        self._bias = None if bias_E is None else (weakref.ref(bias_E), bias_E.data_ptr())
        self.policy, self.spec = policy, spec
        self.depth, self.num_experts, self.top_k = weight_ED.shape[1], spec.num_experts, spec.top_k
        self.constants: bytes | None = None
        self.writes = False
        fits = len(weight_ED) == spec.num_experts and (bias_E is None or bias_E.shape == (spec.num_experts,))
        if fits and not runs_on_torch(policy) and spec.top_k <= MOST_SLOTS and _takes_weights(weight_ED, bias_E):
            rule: SharingRule = policy.rule(spec)
            if rule.size <= spec.num_experts:
                self.constants, self.writes = _constants(weight_ED, bias_E, rule, spec), rule.reuse > 1

    def is_for(self, weight_ED: Tensor, bias_E: Tensor | None, policy: RoutingPolicy, spec: RouterSpec) -> bool:
        """Whether this was made of these, and they lie at the same addresses."""
        if policy is not self.policy or spec is not self.spec or self.weight() is not weight_ED:
            return False
        if weight_ED.dtype is not self.dtype:
            return False
        if bias_E is None or self._bias is None:
            return bias_E is None and self._bias is None
        reference, address = self._bias
        return reference() is bias_E and bias_E.data_ptr() == address

    def route(
        self,
        x_GLD: Tensor,
        bias_E: Tensor | None,
        live_GL: Tensor,
        masked_GL: Tensor | None,
        previous: Coreset | None,
    ) -> Routed | None:
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
            or (torch.is_grad_enabled() and self._has_gradients(x_GLD, bias_E))
            or torch.compiler.is_compiling()
        ):
            return None
        x_GLD, live_GL = x_GLD.contiguous(), live_GL.contiguous()
        masked, member_GE, coreset = 0, None, None
        if masked_GL is not None:
            if masked_GL.shape != live_GL.shape and masked_GL.shape in ((length,), (1, length), (groups, 1)):
                masked_GL = masked_GL.expand(live_GL.shape)
            masked_GL = _checked("masked_GL", masked_GL, (groups, length))
            masked = masked_GL.data_ptr()
        if previous is not None:
            member_GE = _checked("previous.member_GE", previous.member_GE, (groups, self.num_experts))
        if self.writes or previous is not None:
            coreset = Coreset(torch.empty((groups, self.num_experts), dtype=torch.bool))
        new = plan_buffers(groups * length, self.top_k, self.num_experts, groups)
        _call(
            self.constants,
            x_GLD.data_ptr(),
            live_GL.data_ptr(),
            masked,
            0 if member_GE is None else member_GE.data_ptr(),
            0 if coreset is None else coreset.member_GE.data_ptr(),
            0,
            0,
            *new.addresses,
            groups,
            length,
            x_GLD.dtype is torch.bfloat16,
        )
        return Routed(RoutingPlan(new.ids_TK, new.weights_TK, new.active_E), new.load_E, new.unique_G, coreset)

    def _has_gradients(self, x_GLD: Tensor, bias_E: Tensor | None) -> bool:
        weight_ED = self.weight()
        return any(tensor is not None and tensor.requires_grad for tensor in (x_GLD, weight_ED, bias_E))


def _checked(name: str, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """The tensor, contiguous. Raises ConfigError unless the library may read a byte for every element of this shape."""
    if tensor.shape != shape or tensor.dtype is not torch.bool or not tensor.is_cpu:
        raise ConfigError(
            f"expected {name} in torch.bool of shape {shape} on cpu, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} on {tensor.device}: pass what belongs to these tokens and experts."
        )
    return tensor.contiguous()


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


def _call(*fields: Any) -> None:
    """es_route of an es_step of these fields. Raises ConfigError unless the library could do what was asked."""
    if calls.run("es_route", _pack_step, fields) != calls.OK:
        raise ConfigError(
            "the router's gate could not get its memory or its threads: pass fewer tokens at a time, or set fewer "
            "threads with set_num_threads."
        )


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
    groups, length, _ = x_GLD.shape
    affinity_GLE = torch.empty((groups, length, len(weight_ED)))
    choice_GLE = affinity_GLE if bias_E is None else torch.empty_like(affinity_GLE)
    scores = affinity_GLE.data_ptr(), 0 if bias_E is None else choice_GLE.data_ptr()
    none_of_the_plan = (0,) * 5
    _call(
        _constants(weight_ED, bias_E, SharingRule(), spec),
        x_GLD.data_ptr(),
        *(0,) * 4,
        *scores,
        *none_of_the_plan,
        groups * length,
        1,
        x_GLD.dtype is torch.bfloat16,
    )
    return RouterScores(affinity_GLE, choice_GLE, live_GL)


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
