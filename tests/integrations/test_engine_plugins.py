"""Plug-ins of SGLang and vLLM against stand-ins that have these engines' signatures, and against plain formulas."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.errors import ConfigError, InputError, PolicyError
from expertshare.integrations import sglang, vllm
from expertshare.integrations.engine_routing import EngineSettings, read_settings, route_batch, shared_routing

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
E, K, BLOCK = 32, 4, 8
VOTE = EngineSettings("des-vote:budget=6", BLOCK)
EVERYTHING = EngineSettings("des-vote:budget=1.0", BLOCK)


def logits(blocks: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(blocks * BLOCK, E, generator=torch.Generator().manual_seed(seed))


def softmax_top_k(logits_TE: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    weights, ids = logits_TE.float().softmax(-1).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalise else weights), ids


def elected(logits_GE: Tensor, budget: int) -> set[int]:
    """DES-Vote of one block by its definition: sums over the tokens' best K."""
    affinity = logits_GE.softmax(-1)
    best = affinity.topk(K, dim=-1)
    votes = torch.zeros(E).scatter_add(0, best.indices.flatten(), best.values.flatten())
    return set(votes.topk(budget).indices.tolist())


# --- settings -------------------------------------------------------------------------------------------------------


def test_settings_come_from_the_environment_and_are_off_without_a_policy() -> None:
    assert read_settings({}) is None
    assert read_settings({"EXPERTSHARE_POLICY": "  "}) is None
    assert read_settings({"EXPERTSHARE_POLICY": "des-vote"}) == EngineSettings("des-vote", 32)
    assert read_settings({"EXPERTSHARE_POLICY": "des-vote", "EXPERTSHARE_BLOCK_LENGTH": "batch"}) == EngineSettings(
        "des-vote", 0
    )
    for length in ("0", "²", "-5", ""):
        with pytest.raises(InputError, match="EXPERTSHARE_BLOCK_LENGTH"):
            read_settings({"EXPERTSHARE_POLICY": "des-vote", "EXPERTSHARE_BLOCK_LENGTH": length})
    with pytest.raises(PolicyError, match="one forward alone"):
        read_settings({"EXPERTSHARE_POLICY": "des-vote:voters=masked"})
    with pytest.raises(PolicyError, match="Did you mean"):
        read_settings({"EXPERTSHARE_POLICY": "des-vot"})


def test_entry_points_are_declared_and_lead_somewhere() -> None:
    groups = PYPROJECT["project"]["entry-points"]
    for group, module in (("vllm.general_plugins", vllm), ("sglang.srt.plugins", sglang)):
        assert groups[group] == {"expertshare": f"{module.__name__}:register"}
        for installed in entry_points(group=group):
            if installed.name == "expertshare":
                assert callable(installed.load())


# --- routing a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalise", [True, False])
def test_an_all_experts_coreset_is_the_models_own_routing(renormalise: bool) -> None:
    weights, ids = shared_routing(logits(), EVERYTHING.policy, BLOCK, K, "softmax", renormalise)
    own_weights, own_ids = softmax_top_k(logits(), K, renormalise)
    assert ids.dtype == torch.int32
    assert torch.equal(ids, own_ids.int())
    torch.testing.assert_close(weights, own_weights)


def test_every_block_has_its_own_coreset() -> None:
    _, ids = shared_routing(logits(), VOTE.policy, BLOCK, K, "softmax", True)
    for block, own in enumerate(logits().split(BLOCK)):
        used = set(ids[block * BLOCK : (block + 1) * BLOCK].flatten().tolist())
        assert used <= elected(own, 6)
    whole = shared_routing(logits(), VOTE.policy, 0, K, "softmax", True)[1]
    assert len(set(whole.flatten().tolist())) <= 6


def test_a_batch_of_broken_blocks_is_routed_by_the_models_own_rule() -> None:
    prompt = logits()[:-3]
    _, ids = shared_routing(prompt, VOTE.policy, BLOCK, K, "softmax", True)
    assert torch.equal(ids, softmax_top_k(prompt, K, True)[1].int())
    none, no_ids = shared_routing(logits()[:0], VOTE.policy, BLOCK, K, "softmax", True)
    assert (none.shape, no_ids.shape) == ((0, K), (0, K))


def test_an_unused_slot_repeats_an_expert_with_weight_0() -> None:
    weights, ids = shared_routing(logits(), "top-k-cap:experts_per_token=2", BLOCK, K, "softmax", True)
    assert torch.equal(ids[:, 2:], ids[:, :1].expand(-1, 2))
    assert not weights[:, 2:].any()


def test_the_operation_compiles_as_a_whole() -> None:
    torch.library.opcheck(shared_routing, (logits(), VOTE.policy, BLOCK, K, "softmax", True))


# --- vLLM -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm_package(monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.ModuleType]:
    """A fused_moe package whose factory has vLLM's parameters, and a model's module that imported it by name."""

    def install(name: str, factory: Any) -> types.ModuleType:
        parts = ["vllm", "model_executor", "layers", "fused_moe"]
        for depth in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        package, model = sys.modules[".".join(parts)], types.ModuleType("vllm.model_executor.models.qwen3_moe")
        setattr(package, name, factory)
        setattr(model, name, factory)
        monkeypatch.setitem(sys.modules, model.__name__, model)
        return model

    return install


def fused_moe(
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    renormalize: bool = True,
    use_grouped_topk: bool = False,
    prefix: str = "",
    custom_routing_function: Callable[..., Any] | None = None,
    router: Any = None,
    scoring_func: str = "softmax",
    e_score_correction_bias: Tensor | None = None,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """vLLM's factory, as far as routing goes: calls a routing function as CustomRoutingRouter does."""

    def routed(router_logits: Tensor) -> tuple[Tensor, Tensor]:
        if custom_routing_function is None:
            return softmax_top_k(router_logits, top_k, renormalize)
        return custom_routing_function(
            hidden_states=torch.zeros(len(router_logits), hidden_size),
            gating_output=router_logits,
            topk=top_k,
            renormalize=renormalize,
        )

    return routed


class FusedMoEClass:
    """As releases had it before the factory: a layer."""

    def __init__(self, num_experts: int, top_k: int, custom_routing_function: Any = None) -> None:
        self.custom_routing_function = custom_routing_function


def test_vllm_is_left_alone_without_a_policy(vllm_package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERTSHARE_POLICY", raising=False)
    model = vllm_package("FusedMoEFactory", fused_moe)
    vllm.register()
    assert model.FusedMoEFactory is fused_moe


@pytest.mark.parametrize("name", ["FusedMoEFactory", "FusedMoE"])
def test_vllm_layers_get_the_routing_function_once(
    name: str, vllm_package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTSHARE_POLICY", VOTE.policy)
    monkeypatch.setenv("EXPERTSHARE_BLOCK_LENGTH", str(BLOCK))
    model = vllm_package(name, fused_moe)
    vllm.register()
    once = getattr(model, name)
    vllm.register()
    assert getattr(model, name) is once
    assert once is not fused_moe
    _, ids = once(E, K, 16, 8)(logits())
    assert set(ids[:BLOCK].flatten().tolist()) <= elected(logits()[:BLOCK], 6)

    def own(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        return gating_output[:, :topk], torch.zeros(len(gating_output), topk)

    assert not once(E, K, 16, 8, custom_routing_function=own)(logits())[1].any()
    with pytest.raises(ConfigError, match=r"model\.layers\.3"):
        once(E, K, 16, 8, use_grouped_topk=True, prefix="model.layers.3")
    with pytest.raises(ConfigError, match="bias"):
        once(E, K, 16, 8, e_score_correction_bias=torch.zeros(E))


def test_a_vllm_layer_that_is_a_class_stays_one(vllm_package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTSHARE_POLICY", VOTE.policy)
    monkeypatch.setattr(FusedMoEClass, "__init__", FusedMoEClass.__init__)  # put back afterwards
    monkeypatch.setattr(FusedMoEClass, "_expertshare_settings", None, raising=False)
    model = vllm_package("FusedMoE", FusedMoEClass)
    vllm.register()
    layer = model.FusedMoE(E, K)
    assert isinstance(layer, FusedMoEClass)
    assert layer.custom_routing_function == vllm.RoutingFunction(EngineSettings(VOTE.policy, 32))


def test_an_unknown_vllm_is_told(vllm_package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTSHARE_POLICY", VOTE.policy)
    vllm_package("Something", fused_moe)
    with pytest.raises(ConfigError, match="not known"):
        vllm.register()


# --- SGLang ---------------------------------------------------------------------------------------------------------


@dataclass
class TopKConfig:
    """The fields of SGLang's configuration that select_experts reads."""

    top_k: int
    use_grouped_topk: bool = False
    topk_group: int | None = None
    num_expert_group: int | None = None
    renormalize: bool = True
    num_fused_shared_experts: int = 0
    custom_routing_function: Callable[..., Any] | None = None
    correction_bias: Tensor | None = None
    torch_native: bool = False
    routed_scaling_factor: float | None = None
    apply_routed_scaling_factor_on_output: bool = False
    scoring_func: str = "softmax"


class StandardTopKOutput(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor
    router_logits: Tensor


def select_experts(
    hidden_states: Tensor,
    router_logits: Tensor,
    topk_config: TopKConfig,
    *,
    layer_id: int | None = None,
    num_token_non_padded: Tensor | None = None,
    expert_location_dispatch_info: Any = None,
) -> StandardTopKOutput:
    """SGLang's function with its demands on custom routing; the grouped rule is LLaDA2's, by its definition."""
    config = topk_config
    if config.use_grouped_topk:
        weights, ids = grouped_rule(router_logits, config)
    elif config.custom_routing_function is None:
        weights, ids = softmax_top_k(router_logits, config.top_k, config.renormalize)
    else:
        assert num_token_non_padded is None
        assert expert_location_dispatch_info is None
        assert not config.apply_routed_scaling_factor_on_output
        weights, ids = config.custom_routing_function(
            hidden_states=hidden_states,
            gating_output=router_logits,
            topk=config.top_k,
            renormalize=config.renormalize,
        )
    return StandardTopKOutput(weights, ids.int(), router_logits)


def grouped_rule(router_logits: Tensor, config: TopKConfig) -> tuple[Tensor, Tensor]:
    scores = router_logits.float().sigmoid()
    choice = scores + config.correction_bias
    groups = choice.view(len(choice), config.num_expert_group, -1)
    kept = groups.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
    masked = torch.full_like(groups, -torch.inf).scatter(1, *_kept_groups(kept, groups)).flatten(1)
    ids = masked.topk(config.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if config.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if config.apply_routed_scaling_factor_on_output:
        weights = weights * config.routed_scaling_factor
    return weights, ids


def _kept_groups(kept: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    index = kept.unsqueeze(-1).expand(-1, -1, groups.shape[-1])
    return index, groups.gather(1, index)


def test_sglangs_own_routing_is_kept_under_an_all_experts_coreset() -> None:
    bias = torch.randn(E, generator=torch.Generator().manual_seed(1)) * 0.1
    for config in (
        TopKConfig(K),
        TopKConfig(K, renormalize=False),
        TopKConfig(K, True, 2, 4, correction_bias=bias, routed_scaling_factor=2.5),
        TopKConfig(
            K,
            True,
            2,
            4,
            correction_bias=bias,
            routed_scaling_factor=2.5,
            apply_routed_scaling_factor_on_output=True,
        ),
    ):
        hidden = torch.zeros(len(logits()), 16)
        own = select_experts(hidden, logits(), config)
        ours = sglang.select_experts(EVERYTHING, select_experts, hidden, logits(), config, layer_id=3)
        assert torch.equal(ours.topk_ids, own.topk_ids)
        torch.testing.assert_close(ours.topk_weights, own.topk_weights)


def test_sglangs_blocks_share_and_padding_does_not_vote() -> None:
    hidden, config = torch.zeros(3 * BLOCK, 16), TopKConfig(K)
    hook = partial(sglang.select_experts, VOTE)
    shared = hook(select_experts, hidden, logits(), config)
    assert config.custom_routing_function is None  # what SGLang has is not touched
    for block, own in enumerate(logits().split(BLOCK)):
        assert set(shared.topk_ids[block * BLOCK :][:BLOCK].flatten().tolist()) <= elected(own, 6)
    padded = torch.cat((logits()[: 2 * BLOCK], torch.full((BLOCK, E), 9.0)))
    count = torch.tensor(2 * BLOCK)
    some = hook(select_experts, hidden, padded, config, num_token_non_padded=count)
    assert torch.equal(some.topk_ids[: 2 * BLOCK], shared.topk_ids[: 2 * BLOCK])
    assert (some.topk_ids[2 * BLOCK :] == -1).all()


def test_sglangs_layers_that_cannot_share_are_told_or_left_alone() -> None:
    hidden, hook = torch.zeros(3 * BLOCK, 16), partial(sglang.select_experts, VOTE)

    def first(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        return gating_output[:, :topk], torch.zeros(len(gating_output), topk)

    assert not hook(select_experts, hidden, logits(), TopKConfig(K, custom_routing_function=first)).topk_ids.any()
    with pytest.raises(ConfigError, match="disable-shared-experts-fusion"):
        hook(select_experts, hidden, logits(), TopKConfig(K, num_fused_shared_experts=1))
    with pytest.raises(ConfigError, match="load balancing"):
        hook(select_experts, hidden, logits(), TopKConfig(K), expert_location_dispatch_info=object())
    with pytest.raises(ConfigError, match="sqrtsoftplus"):
        hook(select_experts, hidden, logits(), TopKConfig(K, scoring_func="sqrtsoftplus"))
    with pytest.raises(ConfigError, match="groups"):
        hook(select_experts, hidden, logits(), TopKConfig(K, True, 2, 4))


def test_sglangs_registry_gets_one_around_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    class HookType(Enum):
        AFTER = "after"
        AROUND = "around"

    class HookRegistry:
        hooks: ClassVar[list[tuple[str, Any, HookType]]] = []

        @classmethod
        def register(
            cls, target: str, hook: Callable[..., Any], hook_type: HookType = HookType.AFTER, *, source: Any = None
        ) -> None:
            assert not isinstance(hook, type)
            cls.hooks.append((target, hook, hook_type))

    registry = types.ModuleType("sglang.srt.plugins.hook_registry")
    registry.HookRegistry, registry.HookType = HookRegistry, HookType  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.delenv("EXPERTSHARE_POLICY", raising=False)
    sglang.register()
    assert HookRegistry.hooks == []
    monkeypatch.setenv("EXPERTSHARE_POLICY", VOTE.policy)
    monkeypatch.setenv("EXPERTSHARE_BLOCK_LENGTH", str(BLOCK))
    sglang.register()
    ((target, hook, hook_type),) = HookRegistry.hooks
    assert (target, hook_type) == ("sglang.srt.layers.moe.topk.select_experts", HookType.AROUND)
    hidden = torch.zeros(3 * BLOCK, 16)
    output = hook(select_experts, hidden_states=hidden, router_logits=logits(), topk_config=TopKConfig(K))
    assert torch.equal(output.topk_ids, route_batch_ids())


def route_batch_ids() -> Tensor:
    spec = RouterSpec(num_experts=E, top_k=K, activation="softmax", renormalise=True)
    return route_batch(logits(), spec, VOTE)[1]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_real_vllm_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "vllm_plugin.py"
    monkeypatch.setenv("EAGER", "1")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no batch with more than its coreset" in done.stdout
