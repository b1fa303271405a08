"""Expert sharing: policies choose a coreset (`select`), the model's rule routes inside it (`assign`)."""

from expertshare.routing.assign import assign, count_load, everything, route, router_scores
from expertshare.routing.gate import gate_scores
from expertshare.routing.gate import takes as gate_takes
from expertshare.routing.layerwise import Layerwise, policy_at
from expertshare.routing.recipe import Recipe, recipe_of
from expertshare.routing.step import LayerStep
from expertshare.routing.table import POLICIES, Knob, knobs, make_policy, native_policy, parse_knob, parse_policy

__all__ = [
    "POLICIES",
    "Knob",
    "LayerStep",
    "Layerwise",
    "Recipe",
    "assign",
    "count_load",
    "everything",
    "gate_scores",
    "gate_takes",
    "knobs",
    "make_policy",
    "native_policy",
    "parse_knob",
    "parse_policy",
    "policy_at",
    "recipe_of",
    "route",
    "router_scores",
]
