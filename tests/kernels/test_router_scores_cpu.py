"""The native router scores against a product in float64, and that a token's scores depend on nothing but the token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expertshare import native
from expertshare.kernels.cpu_route import router_scores_cpu, takes
from expertshare.routing import router_scores
from expertshare.types import RouterScores
from routing.cases import SPECS, plain_spec

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

ISAS = native.usable_instruction_sets() if native.available() else []
SHAPES = [(1, 8, 3), (5, 37, 9), (16, 64, 8), (17, 301, 13), (33, 300, 64), (32, 1024, 256), (300, 96, 30)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def tensors(shape: tuple[int, int, int], hidden: str, weights: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [1, T, D]; router weights; a bias."""
    tokens, depth, experts = shape
    generator = torch.Generator().manual_seed(tokens + depth)
    x = torch.randn(1, tokens, depth, generator=generator).to(DTYPES[hidden])
    weight = (torch.randn(experts, depth, generator=generator) * 2 * depth**-0.5).to(DTYPES[weights])
    return x, weight, torch.randn(experts, generator=generator) / 8


def scores_of(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "sigmoid") -> RouterScores:
    spec = plain_spec(len(weight), 1, activation=activation)
    return router_scores_cpu(x, weight, bias, torch.ones(x.shape[:2], dtype=torch.bool), spec)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("hidden", DTYPES)
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product_and_the_activation(
    monkeypatch: pytest.MonkeyPatch, isa: str, hidden: str, weights: str, shape: tuple[int, int, int]
) -> None:
    monkeypatch.setenv("EXPERTSHARE_ISA", isa)
    x, weight, bias = tensors(shape, hidden, weights)
    logits = x.double() @ weight.double().T
    for activation, exact in (("sigmoid", logits.sigmoid()), ("softmax", logits.softmax(dim=-1))):
        scores = scores_of(x, weight, bias, activation)
        torch.testing.assert_close(scores.affinity_GLE.double(), exact, rtol=5e-6, atol=1e-30)
        assert torch.equal(scores.choice_GLE, scores.affinity_GLE + bias)
        unbiased = scores_of(x, weight, None, activation)
        assert unbiased.choice_GLE is unbiased.affinity_GLE
        assert torch.equal(unbiased.affinity_GLE, scores.affinity_GLE)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", DTYPES)
def test_a_token_has_the_same_bits_in_any_company(monkeypatch: pytest.MonkeyPatch, isa: str, weights: str) -> None:
    monkeypatch.setenv("EXPERTSHARE_ISA", isa)
    for hidden in DTYPES:
        x, weight, bias = tensors((300, 96, 30), hidden, weights)
        together = scores_of(x, weight, bias).choice_GLE[0]
        for begin, end in ((0, 1), (7, 8), (3, 20), (250, 300), (40, 72)):
            part = scores_of(x[:, begin:end], weight, bias).choice_GLE[0]
            assert torch.equal(part, together[begin:end])
        in_groups = scores_of(x.view(10, 30, 96), weight, bias).choice_GLE
        assert torch.equal(in_groups.flatten(0, 1), together)


def test_threads_do_not_matter() -> None:
    x, weight, bias = tensors((40, 512, 128), "bfloat16", "float32")
    expected = scores_of(x, weight, bias).choice_GLE
    try:
        for threads in (1, 2, 3):
            native.set_num_threads(threads)
            for _ in range(3):
                assert torch.equal(scores_of(x, weight, bias).choice_GLE, expected)
    finally:
        native.set_num_threads(None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("hidden", DTYPES)
def test_weights_held_in_half_the_bytes_give_the_same(monkeypatch: pytest.MonkeyPatch, isa: str, hidden: str) -> None:
    """Bit for bit where both are multiplied in float32; where pairs of bfloat16 are, sums come in another order."""
    monkeypatch.setenv("EXPERTSHARE_ISA", isa)
    for shape in SHAPES:
        x, weight, bias = tensors(shape, hidden, "bfloat16")
        narrow, wide = scores_of(x, weight, bias).affinity_GLE, scores_of(x, weight.float(), bias).affinity_GLE
        if isa == "avx512_bf16" and hidden == "bfloat16":
            torch.testing.assert_close(narrow, wide, rtol=5e-6, atol=1e-30)
        else:
            assert torch.equal(narrow, wide)


def test_extreme_logits_stay_finite() -> None:
    x = torch.tensor([[[1.0], [-1.0]]])
    weight = torch.tensor([[1e4], [-1e4], [0.0]])
    assert scores_of(x, weight, None).affinity_GLE[0, 0].tolist() == pytest.approx([1.0, 0.0, 0.5], abs=1e-37)
    assert scores_of(x, weight, None, "softmax").affinity_GLE[0, 1].tolist() == pytest.approx([0, 1, 0], abs=1e-37)
    assert scores_of(x * torch.nan, weight, None).affinity_GLE.isnan().all()


def test_what_it_takes() -> None:
    x, weight, bias = tensors((4, 16, 8), "bfloat16", "float32")
    assert takes(x, weight, bias)
    assert takes(x, weight, None)
    assert not takes(x.half(), weight, bias)
    assert takes(x, weight.bfloat16(), bias)
    assert not takes(x, weight.half(), bias)
    assert not takes(x, weight, bias.double())
    assert not takes(x, weight.t(), bias)
    assert not takes(x.to("meta"), weight, bias)
    trained = weight.requires_grad_()
    assert not takes(x, trained, bias)
    with torch.no_grad():
        assert takes(x, trained, bias)


def test_close_to_torch() -> None:
    x, weight, bias = tensors((32, 1024, 64), "bfloat16", "float32")
    spec = SPECS["sigmoid groups 64"]
    live = torch.ones(1, 32, dtype=torch.bool)
    native_scores = router_scores_cpu(x, weight, bias, live, spec)
    torch_scores = router_scores(torch.nn.functional.linear(x.float(), weight), live, spec, bias)
    torch.testing.assert_close(native_scores.choice_GLE, torch_scores.choice_GLE, rtol=1e-6, atol=1e-6)
