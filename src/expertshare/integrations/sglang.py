"""A policy inside SGLang: an entry point of the group `sglang.srt.plugins`, off without EXPERTSHARE_POLICY.

Wraps the expert selection of SGLang and gives it a routing function.

Read against SGLang's plug-in registry and sglang/srt/layers/moe/topk.py: an AROUND hook is called with the original
function first; `select_experts(hidden_states, router_logits, topk_config, *, layer_id, num_token_non_padded,
expert_location_dispatch_info)` asks `topk_config.custom_routing_function(hidden_states, gating_output, topk,
renormalize)` where the configuration has one and does not use groups, and finishes the ids itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.errors import ConfigError
from expertshare.integrations.engine_routing import EngineSettings, read_settings, route_batch

TARGET = "sglang.srt.layers.moe.topk.select_experts"
REGISTRY = "sglang.srt.plugins.hook_registry"


def select_experts(
    settings: EngineSettings,
    original: Callable[..., Any],
    hidden_states: Tensor,
    router_logits: Tensor,
    topk_config: Any,
    *,
    num_token_non_padded: Tensor | None = None,
    **more: Any,
) -> Any:
    """The hook: the output of SGLang's function, `original`, with ids and weights under the policy. A layer that has a
    routing function of its own keeps it. Raises ConfigError for what no routing function can stand for."""
    if topk_config.custom_routing_function is not None:
        return original(hidden_states, router_logits, topk_config, num_token_non_padded=num_token_non_padded, **more)
    if topk_config.num_fused_shared_experts or more.get("expert_location_dispatch_info") is not None:
        raise ConfigError(
            "expected routed experts alone, at their own places, got shared experts fused with them, or moved ones: "
            "start SGLang with --disable-shared-experts-fusion and without expert load balancing, or unset "
            "EXPERTSHARE_POLICY"
        )
    spec, bias = _spec(topk_config, router_logits.shape[-1]), topk_config.correction_bias
    live = None
    if num_token_non_padded is not None:
        live = torch.arange(len(router_logits), device=router_logits.device) < num_token_non_padded

    def chosen(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        del hidden_states, topk, renormalize  # of the same configuration
        return route_batch(gating_output, spec, settings, bias_E=bias, live_T=live)

    lent = replace(
        topk_config,
        use_grouped_topk=False,
        correction_bias=None,
        apply_routed_scaling_factor_on_output=False,  # the weights have it already
        custom_routing_function=chosen,
    )
    return original(hidden_states, router_logits, lent, **more)


def register() -> None:
    """The entry point: SGLang calls it once in every process, before it applies hooks."""
    settings = read_settings()
    if settings is None:
        return
    registry = importlib.import_module(REGISTRY)

    def around(original: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        return select_experts(settings, original, *positional, **named)

    registry.HookRegistry.register(TARGET, around, registry.HookType.AROUND)


def _spec(config: Any, num_experts: int) -> RouterSpec:
    """The model's own rule, as its configuration has it. With groups SGLang's sigmoid rule needs a bias."""
    grouped, biased = config.use_grouped_topk, config.correction_bias is not None
    if grouped and not biased and config.num_expert_group != 1:
        raise ConfigError(
            "expected a bias beside expert groups (a group scores the sum of its two best), got none: this rule of "
            "SGLang is not one of expertshare's; unset EXPERTSHARE_POLICY"
        )
    activation: Literal["softmax", "sigmoid"]
    activation = "sigmoid" if (grouped and biased) or config.scoring_func == "sigmoid" else "softmax"
    if config.scoring_func not in ("softmax", "sigmoid"):
        raise ConfigError(f"expected softmax or sigmoid, got {config.scoring_func!r}: unset EXPERTSHARE_POLICY")
    scaled = config.apply_routed_scaling_factor_on_output and config.routed_scaling_factor is not None
    return RouterSpec(
        num_experts=num_experts,
        top_k=config.top_k,
        activation=activation,
        renormalise=config.renormalize,
        scaling=float(config.routed_scaling_factor) if scaled else 1.0,
        num_groups=config.num_expert_group if grouped else 1,
        kept_groups=config.topk_group if grouped else 1,
        has_bias=biased,
    )
