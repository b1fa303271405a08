"""Expert sharing: a policy is a rule; the rule chooses a coreset (`select`), the model routes inside it (`assign`)."""

from expertshare.routing.assign import assign
from expertshare.routing.policies import (
    POLICIES,
    knobs,
    make_policy,
    native_policy,
    parse_knob,
    parse_policies,
    parse_policy,
    policy_label,
    policy_record,
    split_policies,
)
from expertshare.routing.policy import Layerwise, RoutingPolicy, default_budget, policy_at, runs_on_torch
from expertshare.routing.route import count_load, route, route_layer, router_scores
from expertshare.routing.rule import SharingRule
from expertshare.routing.select import everything, select

__all__ = [
    "POLICIES",
    "Layerwise",
    "RoutingPolicy",
    "SharingRule",
    "assign",
    "count_load",
    "default_budget",
    "everything",
    "knobs",
    "make_policy",
    "native_policy",
    "parse_knob",
    "parse_policies",
    "parse_policy",
    "policy_at",
    "policy_label",
    "policy_record",
    "route",
    "route_layer",
    "router_scores",
    "runs_on_torch",
    "select",
    "split_policies",
]
