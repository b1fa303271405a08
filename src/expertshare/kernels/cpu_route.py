"""A layer's routing in one call of the native library: scores, coreset, plan and counts (csrc/routing_step.h)."""

from __future__ import annotations

import struct
import weakref
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertshare import native
from expertshare.config import RouterSpec
from expertshare.errors import ConfigError
from expertshare.native import calls
from expertshare.routing import RoutingPolicy, SharingRule, route_layer, runs_on_torch
from expertshare.routing.route import routed
from expertshare.routing.rule import RANKINGS, expert_groups
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
    found = prepared.route(x_GLD, live_GL, masked_GL, previous)
    if found is not None:
        return found
    if takes(x_GLD, weight_ED, bias_E):
        scores = replace(router_scores_cpu(x_GLD, weight_ED, bias_E, live_GL, spec), masked_GL=masked_GL)
        return routed(scores, policy, spec, previous)
    return route_layer(x_GLD, weight_ED, bias_E, policy, spec, live_GL, masked_GL=masked_GL, previous=previous)


_CONSTANTS = struct.Struct("PP3q2i 2q3dq8if4x")  # the first part of es_step: w, bias, sizes, kinds, es_rule
_pack_step = struct.Struct(f"{_CONSTANTS.size}s12P2q3iP").pack


def _constants(weight_ED: Tensor, bias_E: Tensor | None, rule: SharingRule, spec: RouterSpec) -> bytes:
    """What stays the same for a layer, as es_step begins."""
    shares = [-1.0 if share is None else share for share in (rule.prefix_share, rule.saturation, rule.drop_share)]
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
        *shares,
        spec.top_k if rule.experts_per_token is None else rule.experts_per_token,
        RANKINGS.index(rule.ranking),
        rule.keep_protected,
        rule.voters == "masked",
        *expert_groups(spec, rule.ballots == "grouped"),
        *expert_groups(spec, rule.group_limit == "inside"),
        spec.renormalise,
        spec.scaling,
    )


class _Prepared:
    """What stays the same from one routing of a layer to the next, as the library reads it.

    Between two of them the experts have passed through the caches: every line of Python and every object that is
    touched here comes from memory again, so all that can be known beforehand is.
    """

    __slots__ = ("_bias", "_dtype", "_weight", "constants", "depth", "policy", "spec", "writes")

    def __init__(self, weight_ED: Tensor, bias_E: Tensor | None, policy: RoutingPolicy, spec: RouterSpec) -> None:
        self._weight, self._dtype, self.depth = weakref.ref(weight_ED), weight_ED.dtype, weight_ED.shape[1]
        self._bias = None if bias_E is None else weakref.ref(bias_E)
        self.policy, self.spec = policy, spec
        self.constants: bytes | None = None  # None: left to torch
        self.writes = False
        fits = len(weight_ED) == spec.num_experts and (bias_E is None or bias_E.shape == (spec.num_experts,))
        if fits and not runs_on_torch(policy) and spec.top_k <= MOST_SLOTS and _takes_weights(weight_ED, bias_E):
            rule = policy.rule(spec)
            if rule.size <= spec.num_experts:
                self.constants, self.writes = _constants(weight_ED, bias_E, rule, spec), rule.reuse > 1

    def is_of(self, weight_ED: Tensor, bias_E: Tensor | None) -> bool:
        """Whether this was made of these, and not of others that lay at their addresses before."""
        same_bias = bias_E is None or (self._bias is not None and self._bias() is bias_E)
        return same_bias and self._weight() is weight_ED and self._dtype is weight_ED.dtype

    def route(
        self, x_GLD: Tensor, live_GL: Tensor, masked_GL: Tensor | None, previous: Coreset | None
    ) -> Routed | None:
        """The layer's routing; None for what is left to torch."""
        groups, length, depth = x_GLD.shape
        if (
            self.constants is None
            or live_GL.dtype is not torch.bool
            or not live_GL.is_cpu
            or depth != self.depth
            or length > MOST_TOKENS
            or live_GL.shape != (groups, length)
            or not _takes_features(x_GLD, self._weight(), None if self._bias is None else self._bias())
        ):
            return None
        num_experts, coreset = self.spec.num_experts, None
        x_GLD, live_GL = x_GLD.contiguous(), live_GL.contiguous()
        masked = member = written = 0
        if masked_GL is not None:
            if masked_GL.shape != live_GL.shape and masked_GL.shape in ((length,), (1, length), (groups, 1)):
                masked_GL = masked_GL.expand(live_GL.shape)
            masked_GL = _checked("masked_GL", masked_GL, (groups, length))
            masked = masked_GL.data_ptr()
        if previous is not None:
            member_GE = _checked("previous.member_GE", previous.member_GE, (groups, num_experts))
            member = member_GE.data_ptr()
        if self.writes or previous is not None:
            coreset = Coreset(torch.empty((groups, num_experts), dtype=torch.bool))
            written = coreset.member_GE.data_ptr()
        new = plan_buffers(groups * length, self.spec.top_k, num_experts, groups)
        pointers = x_GLD.data_ptr(), live_GL.data_ptr(), masked, member, written, 0, 0, *new.addresses
        _call(self.constants, *pointers, groups, length, x_GLD.dtype is torch.bfloat16)
        return Routed(RoutingPlan(new.ids_TK, new.weights_TK, new.active_E), new.load_E, new.unique_G, coreset)


def _checked(name: str, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """The tensor, contiguous. Raises ConfigError unless the library may read a byte for every element of this shape."""
    if tensor.shape != shape or tensor.dtype is not torch.bool or not tensor.is_cpu:
        raise ConfigError(
            f"expected {name} in torch.bool of shape {shape} on cpu, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} on {tensor.device}: pass what belongs to these tokens and experts."
        )
    return tensor.contiguous()


_MOST_PREPARED = 4096  # layers times policies: an entry holds a few hundred bytes, and no weights
_prepared: dict[tuple[int, int, int, int], _Prepared] = {}


def _prepared_for(weight_ED: Tensor, bias_E: Tensor | None, policy: RoutingPolicy, spec: RouterSpec) -> _Prepared:
    """An entry keeps its policy and spec alive, so that their numbers stay theirs."""
    key = weight_ED.data_ptr(), 0 if bias_E is None else bias_E.data_ptr(), id(policy), id(spec)
    found = _prepared.get(key)
    if found is None or not found.is_of(weight_ED, bias_E):
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        found = _prepared[key] = _Prepared(weight_ED, bias_E, policy, spec)
    return found


def _call(*fields: Any) -> None:
    """es_route of an es_step of these fields. Raises ConfigError unless the library could do what was asked."""
    if calls.run("es_route", _pack_step, fields) != calls.OK:
        raise ConfigError(
            "the router's gate could not get its memory or its threads: pass fewer tokens at a time, or set fewer "
            "threads with set_num_threads."
        )


def takes(x_GLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> bool:
    """Whether the library is there and can compute with these: floats, no gradients, all on the CPU."""
    return _takes_features(x_GLD, weight_ED, bias_E) and _takes_weights(weight_ED, bias_E)


def _takes_features(x_GLD: Tensor, *weights: Tensor | None) -> bool:
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_GLD, *weights))
    return x_GLD.dtype in calls.FEATURES and x_GLD.is_cpu and not records and not torch.compiler.is_compiling()


def _takes_weights(weight_ED: Tensor, bias_E: Tensor | None) -> bool:
    fits = weight_ED.dtype in calls.FEATURES and weight_ED.is_cpu and weight_ED.is_contiguous()
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
    pointers = x_GLD.data_ptr(), *(0,) * 4, *scores, *none_of_the_plan
    _call(
        _constants(weight_ED, bias_E, SharingRule(), spec), *pointers, groups * length, 1, x_GLD.dtype is torch.bfloat16
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
    kind = tokens, top_k, experts, groups, torch.is_inference_mode_enabled()
    try:
        return _unused[kind].pop()
    except (KeyError, IndexError):
        count = max(1, min(_MOST_PLANS, _MOST_PLAN_TOKENS // max(1, tokens)))
    dtypes = torch.int64, torch.float32, torch.bool, torch.int64, torch.int64
    shapes = (tokens, top_k), (tokens, top_k), (experts,), (experts,), (groups,)
    parts = [
        torch.empty((count, *shape), dtype=dtype, device="cpu").unbind()
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    each = zip(*parts, strict=True)
    first, *others = (PlanBuffers._make((*one, tuple(tensor.data_ptr() for tensor in one))) for one in each)
    if len(_unused) >= _MOST_KINDS:
        _unused.clear()
    _unused[kind] = others  # another thread may have been here: its rest goes
    return first
