"""The policies that the kernels can run. One that enters the table without a recipe runs by torch's operations."""

from __future__ import annotations

from expertshare.routing import POLICIES, make_policy, recipe_of
from routing.cases import SPECS

_SPEC = SPECS["softmax plain"]
WITH_RECIPE = [name for name in POLICIES if recipe_of(make_policy(name).bind(_SPEC), _SPEC) is not None]
