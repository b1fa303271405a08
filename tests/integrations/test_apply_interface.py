"""What apply() refuses, how blocks are cut, what is counted, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

import expertshare
from expertshare.errors import ConfigError, InputError, PolicyError
from expertshare.routing import Layerwise, make_policy

from .tiny_models import ALL, CANVAS, TOP_K, build, logits, tokens


def tiny(kind: Any, config: Any, **more: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(config(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=50, **more))


def test_a_second_policy_is_refused_until_the_first_is_removed() -> None:
    model = build("olmoe")
    handle = expertshare.apply(model, "vanilla")
    for part in (model, model.model):
        with pytest.raises(ConfigError, match=r"has a policy already: call remove\(\)"):
            expertshare.apply(part, "vanilla")
    handle.remove()
    expertshare.apply(model.model, "vanilla").remove()


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (lambda: tiny(LlamaForCausalLM, LlamaConfig), "got LlamaForCausalLM with no router"),
        (lambda: tiny(GptOssForCausalLM, GptOssConfig, num_local_experts=4), "GptOssFor.* with .*GptOssTopKRouter"),
        (lambda: build("olmoe").model.layers[0].mlp, "outside any list. Pass the whole model"),
        (lambda: "a path", "expected a loaded model of transformers, got str"),
    ],
    ids=["dense", "another router", "a block", "a path"],
)
def test_other_models_are_named_in_the_error(model: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        expertshare.apply(model(), "vanilla")


def test_the_supported_classes_are_named_in_the_error() -> None:
    with pytest.raises(ConfigError) as error:
        expertshare.apply(tiny(LlamaForCausalLM, LlamaConfig), "vanilla")
    for name in ("OLMoE", "Qwen3-MoE", "Mixtral", "GLM-4-MoE", "DiffusionGemma", "LLaDA2", "LLaDA-MoE", "SDAR"):
        assert name in str(error.value)


@pytest.mark.parametrize("knob", ["voters=masked", "reuse=2"])
def test_a_policy_that_has_to_know_the_step_is_refused(knob: str) -> None:
    with pytest.raises(PolicyError, match="without voters=masked and reuse"):
        expertshare.apply(build("olmoe"), f"des-vote:{knob}")


@pytest.mark.parametrize("name", ALL)
def test_a_policy_that_does_not_fit_is_refused_at_once(name: str) -> None:
    model = build(name)
    least = 6 if name in ("glm4_moe", "llada2") else TOP_K
    with pytest.raises(PolicyError, match=rf"the budget must lie in {least}\.\.16"):
        expertshare.apply(model, f"des-vote:budget={least - 1}")
    assert not any(module._forward_hooks for module in model.modules())
    with expertshare.apply(model, f"des-vote:budget={least}"):
        logits(model, tokens())


def test_a_layerwise_policy_needs_a_policy_for_each_layer() -> None:
    with pytest.raises(PolicyError, match="expected one policy for each of the model's 2 MoE layers, got 1"):
        expertshare.apply(build("glm4_moe"), Layerwise(layers=(make_policy("vanilla"),)))


def test_a_router_with_another_rule_is_found_out() -> None:
    """Its class says softmax; this one was changed to something else."""
    model = build("qwen3_moe")
    model.model.layers[0].mlp.gate.forward = lambda x: (
        x @ model.model.layers[0].mlp.gate.weight.T,
        torch.full((len(x), TOP_K), 0.25),
        torch.arange(TOP_K).expand(len(x), -1),
    )
    with pytest.raises(ConfigError, match="its rule is not supported"):
        expertshare.apply(model, "vanilla")


@pytest.mark.parametrize("implementation", ["no such thing", "expertshare"])
def test_experts_that_cannot_be_chosen(implementation: str) -> None:
    model = build("olmoe") if implementation == "no such thing" else build("sdar")
    with pytest.raises(ConfigError, match="experts_implementation"):
        expertshare.apply(model, "vanilla", experts_implementation=implementation)
    assert not any(module._forward_hooks for module in model.modules())


def test_block_length_comes_from_the_argument_or_the_config() -> None:
    def length(name: str, given: int | None = None, **config: int | None) -> int | None:
        model = build(name)
        for key, value in config.items():
            setattr(model.config, key, value)
        handle = expertshare.apply(model, "vanilla", block_length=given)
        handle.remove()
        return handle.block_length

    assert length("olmoe") is None
    assert length("olmoe", 4) == 4
    assert length("diffusion_gemma") == CANVAS
    assert length("diffusion_gemma", 4) == 4
    assert length("llada2") == 32
    assert length("llada_moe") == 32
    assert length("sdar") == 4
    with pytest.raises(ConfigError, match="give block_length"):
        length("sdar", block_size=None)
    assert length("sdar", block_size=16) == 16
    assert length("llada2", block_length=8) == 8
    with pytest.raises(ConfigError, match="expected one block length in the config"):
        length("sdar", block_size=16, block_length=8)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="expected block_length to be a whole number"):
            length("olmoe", wrong)  # type: ignore[arg-type]


def test_a_router_called_on_its_own_is_refused() -> None:
    model = build("olmoe")
    with expertshare.apply(model, "vanilla"), pytest.raises(InputError, match="call the whole model"):
        model.model.layers[0].mlp(torch.zeros(1, 3, 32))


def test_a_mask_that_says_nothing_of_padding_is_refused() -> None:
    model = build("sdar")
    with expertshare.apply(model, "vanilla"), pytest.raises(InputError, match=r"expected an attention mask \[batch"):
        model(tokens(), attention_mask=torch.ones(2, 1, 1, 5))


def test_metrics_count_blocks_batch_pairs_and_bytes() -> None:
    """Four blocks of six tokens, each with a coreset of exactly K experts."""
    model = build("olmoe")
    with expertshare.apply(model, "des-vote:budget=4", block_length=6) as handle:
        with handle.metrics() as used:
            logits(model, tokens())
            logits(model, tokens(seed=4))
        logits(model, tokens())
        with handle.metrics() as later:
            pass
    assert used.forwards == 2
    assert used.unique_experts == 4
    assert 4 < used.union_experts <= 16
    assert used.pairs == 2 * 2 * 24 * TOP_K
    bytes_per_expert = 3 * 32 * 24 * 4
    assert used.expert_bytes == round(used.union_experts * 2 * 2) * bytes_per_expert
    assert used.multiplied is None, "another implementation computed"
    assert [use.name for use in used.by_layer] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert (later.forwards, later.pairs, later.unique_experts, later.expert_bytes) == (0, 0, 0, 0)


def test_bytes_of_remote_code_are_those_of_its_expert_modules() -> None:
    model = build("llada2")
    with expertshare.apply(model, "des-vote:budget=6") as handle, handle.metrics() as used:
        logits(model, tokens(rows=1))
    assert used.expert_bytes == round(used.union_experts * 2) * 3 * 16 * 8 * 4


def test_gradients_reach_the_router_through_a_policy() -> None:
    model = build("qwen3_moe").requires_grad_(True)
    with expertshare.apply(model, "des-vote:budget=6"):
        model(tokens()).logits.sum().backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().sum() > 0


def test_importing_expertshare_stays_light() -> None:
    code = (
        "import sys, expertshare; assert 'torch' not in sys.modules and 'transformers' not in sys.modules; "
        "assert 'apply' in dir(expertshare)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_package_without_the_name_says_so() -> None:
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        _ = expertshare.aply  # type: ignore[attr-defined]


def test_stacks_that_take_no_known_input_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(model_type="odd")
            self.layers = build("sdar").layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x, None)

    model = Odd()
    with expertshare.apply(model, "vanilla"), pytest.raises(InputError, match="expected input_ids or inputs_embeds"):
        model(torch.zeros(1, 3, 16))
