"""`experts_implementation="expertshare"`: the results of transformers' own loop, and a count of what it multiplied."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeForCausalLM

import expertshare
from expertshare import native
from expertshare.errors import ConfigError
from expertshare.integrations.transformers import experts as implementation
from expertshare.kernels.cpu_backend import CpuBackend

from .tiny_models import TOP_K, build, logits, tokens

SILU = ["olmoe", "qwen3_moe", "mixtral", "glm4_moe"]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}

needs_kernel = pytest.mark.skipif(native.unavailable_reason() is not None, reason="the native library is not built")


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Which experts our kernel was given, call by call."""
    calls: list[Tensor] = []

    def counted(x: Tensor, plan: Any, bank: Any) -> Tensor:
        calls.append(plan.active_E)
        return CpuBackend().moe_ffn(x, plan, bank)

    monkeypatch.setattr(implementation._OURS, "moe_ffn", counted)
    return calls


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SILU)
def test_the_kernel_equals_the_eager_loop(name: str, dtype: torch.dtype, kernel_calls: list[Tensor]) -> None:
    model = build(name, dtype)
    block = next(m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "num_experts"))
    x = torch.randn(9, block.gate_up_proj.shape[-1], generator=torch.Generator().manual_seed(1)).to(dtype)
    ids = torch.stack([torch.randperm(16)[:TOP_K] for _ in range(9)])
    weights = torch.rand(9, TOP_K).to(dtype)
    weights[3] = 0
    model.set_experts_implementation("eager")
    expected = block(x, ids, weights)
    model.set_experts_implementation("expertshare")
    actual = block(x, ids, weights)
    assert len(kernel_calls) == 1, "our kernel must have computed"
    assert actual.dtype == dtype
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype] * scale)
    assert not actual[3].any(), "a token without weights runs no expert"


@needs_kernel
@pytest.mark.parametrize("name", SILU)
def test_logits_of_the_whole_model_are_close(name: str) -> None:
    model = build(name)
    model.set_experts_implementation("eager")
    expected = logits(model, tokens())
    with expertshare.apply(model, "vanilla", experts_implementation="expertshare"):
        torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-3, atol=1e-3)
    with expertshare.apply(model, "des-vote:budget=6"):
        restricted = logits(model, tokens())
    with expertshare.apply(model, "des-vote:budget=6", experts_implementation="expertshare"):
        torch.testing.assert_close(logits(model, tokens()), restricted, rtol=1e-3, atol=1e-3)


@needs_kernel
def test_weights_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("olmoe")
    addresses = []

    def noted(x: Tensor, plan: Any, bank: Any) -> Tensor:
        addresses.append((bank.gate_up_EHD.data_ptr(), bank.down_EDF.data_ptr()))
        return x

    monkeypatch.setattr(implementation._OURS, "moe_ffn", noted)
    model.set_experts_implementation("expertshare")
    logits(model, tokens())
    layers = [layer.mlp.experts for layer in model.model.layers]
    assert addresses == [(e.gate_up_proj.data_ptr(), e.down_proj.data_ptr()) for e in layers]


@needs_kernel
def test_fewer_experts_are_multiplied_under_des_vote(kernel_calls: list[Tensor]) -> None:
    model, ids_BS = build("qwen3_moe"), tokens(rows=1, length=24)
    multiplied = {}
    for policy in ("vanilla", "des-vote:budget=8", "des-vote:budget=4"):
        kernel_calls.clear()
        with expertshare.apply(model, policy, experts_implementation="expertshare") as handle, handle.metrics() as used:
            logits(model, ids_BS)
        multiplied[policy] = [use.multiplied for use in used.by_layer]
        assert multiplied[policy] == [int(active.sum()) for active in kernel_calls]
        assert used.union_experts == sum(multiplied[policy]) / 2
    assert min(multiplied["vanilla"]) > 10
    assert max(multiplied["des-vote:budget=8"]) <= 8
    assert multiplied["des-vote:budget=4"] == [4, 4]


def test_gelu_takes_the_grouped_path_and_says_so(caplog: pytest.LogCaptureFixture, kernel_calls: list[Tensor]) -> None:
    """DiffusionGemma's experts are gelu: transformers' own grouped_mm computes them, to the bit."""
    implementation._say_once.cache_clear()
    model = build("diffusion_gemma")
    model.set_experts_implementation("grouped_mm")
    expected = logits(model, tokens())
    with (
        caplog.at_level(logging.WARNING),
        expertshare.apply(model, "vanilla", experts_implementation="expertshare") as handle,
        handle.metrics() as used,
    ):
        assert torch.equal(logits(model, tokens()), expected)
    assert not kernel_calls
    assert caplog.text.count("not silu(gate) * up") == 1
    assert used.multiplied == round(used.union_experts * 4)


def test_biased_interleaved_experts_take_the_grouped_path(kernel_calls: list[Tensor]) -> None:
    """gpt-oss: transposed, interleaved, biased, clamped. Its eager loop is the reference."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
    config = GptOssConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=16, vocab_size=50)
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval().requires_grad_(False)
    model.set_experts_implementation("eager")
    expected = logits(model, tokens())
    model.set_experts_implementation("expertshare")
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-4, atol=1e-5)
    assert not kernel_calls


@pytest.mark.parametrize("change", ["float16", "gradients", "strided"])
def test_what_the_kernel_cannot_take_is_computed_all_the_same(change: str, kernel_calls: list[Tensor]) -> None:
    model = build("olmoe", torch.float16 if change == "float16" else torch.float32)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(5, 32, dtype=model.dtype)
    if change == "gradients":
        model.requires_grad_(True)
    if change == "strided":
        experts.down_proj = nn.Parameter(experts.down_proj.mT.contiguous().mT, requires_grad=False)
    ids, weights = torch.stack([torch.randperm(16)[:TOP_K] for _ in range(5)]), torch.rand(5, TOP_K, dtype=model.dtype)
    model.set_experts_implementation("eager")
    expected = experts(x, ids, weights)
    model.set_experts_implementation("expertshare")
    tolerance = 0.01 if change == "float16" else 1e-4
    torch.testing.assert_close(experts(x, ids, weights), expected, rtol=tolerance, atol=tolerance)
    assert not kernel_calls
    if change == "gradients":
        experts(x, ids, weights).sum().backward()
        assert experts.down_proj.grad is not None


def test_a_dtype_that_nobody_takes_is_refused() -> None:
    model = build("olmoe", torch.float64)
    model.set_experts_implementation("expertshare")
    with pytest.raises(ConfigError, match=r"got torch\.float64: convert the model"):
        logits(model, tokens())


def test_experts_without_fused_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="expects fused parameters"):
        implementation.experts_forward(nn.Linear(4, 4), torch.zeros(1, 4), torch.zeros(1, 1), torch.zeros(1, 1))


def test_from_pretrained_takes_the_name(tmp_path: Any) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, experts_implementation="expertshare")
    assert model.get_experts_implementation()[""] == "expertshare"
