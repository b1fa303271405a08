"""A policy inside vLLM: an entry point of the group `vllm.general_plugins`, off without EXPERTSHARE_POLICY.

Gives vLLM's fused MoE layer a routing function, where the model has none of its own.

Read against vLLM 0.32 and its main branch: `FusedMoEFactory` (`FusedMoE` before) in
vllm.model_executor.layers.fused_moe takes `custom_routing_function`, which is called with hidden_states, gating_output,
topk and renormalize by name and returns weights and ids. It does not go with grouped top-k.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor

from expertshare.errors import ConfigError
from expertshare.integrations.engine_routing import EngineSettings, read_settings, shared_routing

PACKAGE = "vllm.model_executor.layers.fused_moe"
FACTORIES = ("FusedMoEFactory", "FusedMoE")
"""Under whichever of these names the release has it."""
MARK = "_expertshare_settings"


@dataclass(frozen=True, slots=True)
class RoutingFunction:
    """A `custom_routing_function` under a policy. activation: softmax or sigmoid, the model's own."""

    settings: EngineSettings
    activation: str = "softmax"

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Weights float32 and ids int32 [T, topk]. hidden_states: not looked at."""
        del hidden_states
        policy, length = self.settings.policy, self.settings.block_length
        weights, ids = shared_routing(gating_output, policy, length, topk, self.activation, renormalize)
        return weights, ids


def register() -> None:
    """The entry point. vLLM calls it in every process, sometimes more than once."""
    settings = read_settings()
    if settings is None:
        return
    package = importlib.import_module(PACKAGE)
    names = [name for name in FACTORIES if hasattr(package, name)]
    if not names:
        raise ConfigError(
            f"expected one of {', '.join(FACTORIES)} in {PACKAGE}, found neither: this release of vLLM is not known, "
            "unset EXPERTSHARE_POLICY"
        )
    for name in names:
        original = getattr(package, name)
        if getattr(original, MARK, None) is None:
            _put_in_place(name, original, settings)


def _put_in_place(name: str, original: Any, settings: EngineSettings) -> None:
    """A class keeps its identity and gets another __init__; a function is exchanged wherever it was imported."""
    if inspect.isclass(original):
        setattr(original, "__init__", _with_policy(original.__init__, settings))  # noqa: B010 - a method, for mypy
        setattr(original, MARK, settings)
        return
    changed = _with_policy(original, settings)
    setattr(changed, MARK, settings)
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "vllm" and vars(module).get(name) is original:
            setattr(module, name, changed)


def _with_policy(factory: Callable[..., Any], settings: EngineSettings) -> Callable[..., Any]:
    signature = inspect.signature(factory)

    @wraps(factory)
    def made(*positional: Any, **named: Any) -> Any:
        given = signature.bind(*positional, **named)
        given.apply_defaults()
        if given.arguments.get("custom_routing_function") is None:
            named["custom_routing_function"] = _function_for(given.arguments, settings)
        return factory(*positional, **named)

    return made


def _function_for(layer: dict[str, Any], settings: EngineSettings) -> RoutingFunction:
    """Raises ConfigError for a router that a routing function cannot stand for."""
    activation = layer.get("scoring_func", "softmax")
    plain = not layer.get("use_grouped_topk") and layer.get("e_score_correction_bias") is None
    if not plain or layer.get("router") is not None or activation not in ("softmax", "sigmoid"):
        raise ConfigError(
            f"expected a plain softmax or sigmoid router in layer {layer.get('prefix', '')!r}, got one with groups, a "
            "bias or a rule of its own, for which vLLM takes no routing function: unset EXPERTSHARE_POLICY"
        )
    return RoutingFunction(settings, activation)
