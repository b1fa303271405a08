"""The contract of backends: what each of them makes faster is compared with torch's, operation by operation.

Outputs that nobody wrote are NaN (`unwritten_is_nan`). The kernels' own tests hold them to tighter limits.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends import backend_named
from expertshare import native
from expertshare.config import RouterSpec
from expertshare.kernels import BACKENDS, Backend, CacheSlice, LayerKeyValues, TorchBackend
from expertshare.kernels.backend import Past
from expertshare.kernels.quantise import QUANTISATIONS, quantise_bank, quantise_table
from expertshare.kernels.triton import interpreted, unavailable_reason
from expertshare.routing import POLICIES, make_policy
from expertshare.types import Bank, QuantisedTable

from .test_moe_ffn import scene

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

TORCH = TorchBackend()
WHY_NOT = {"torch": None, "cpu": native.unavailable_reason(), "triton": unavailable_reason()}
FASTER = [
    pytest.param(name, marks=pytest.mark.skipif(WHY_NOT[name] is not None, reason=str(WHY_NOT[name])))
    for name in BACKENDS
    if name != "torch"
]
DTYPES = [torch.float32, torch.bfloat16]
OPERATIONS = [name for name, _ in inspect.getmembers(Backend, inspect.isfunction) if not name.startswith("_")]


class Ran:
    """One backend on its device: takes and gives tensors of the host."""

    def __init__(self, name: str) -> None:
        self.backend = backend_named(name)
        self.device = torch.device("cuda" if name == "triton" and not interpreted() else "cpu")

    def takes(self, dtype: torch.dtype) -> bool:
        """Triton's interpreter multiplies bfloat16 wrongly."""
        return not (self.backend.name == "triton" and interpreted() and dtype == torch.bfloat16)


@pytest.fixture(params=FASTER)
def ran(request: pytest.FixtureRequest) -> Ran:
    return Ran(request.param)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest, ran: Ran) -> torch.dtype:
    if not ran.takes(request.param):
        pytest.skip("not by Triton's interpreter")
    return request.param  # type: ignore[no-any-return]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """float32 by the order of sums, bfloat16 by a rounding or two."""
    share = 1e-5 if expected.dtype == torch.float32 else 2e-2
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found.cpu().double() - expected.double()).abs().max() <= share * expected.double().abs().max()


@pytest.mark.parametrize("name", BACKENDS)
def test_every_operation_is_there_with_the_same_arguments(name: str) -> None:
    backend = backend_named(name)
    assert backend.name == name
    for operation in OPERATIONS:
        wanted, given = (inspect.signature(getattr(kind, operation)).parameters for kind in (Backend, type(backend)))
        assert [one for one in given if one != "self"] == [one for one in wanted if one != "self"], operation


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("policy_name", POLICIES)
def test_route(ran: Ran, policy_name: str, activation: str, dtype: torch.dtype) -> None:
    spec = RouterSpec(
        num_experts=32,
        top_k=4,
        activation="sigmoid" if activation == "sigmoid" else "softmax",
        renormalise=True,
        has_bias=activation == "sigmoid",
    )
    policy = make_policy(policy_name).bind(spec)
    x, weight = random(3, 8, 64, dtype=dtype), random(32, 64, seed=1) * 0.1
    bias = random(32, seed=2) * 0.01 if spec.has_bias else None
    live, masked = torch.rand(3, 8) > 0.2, torch.rand(3, 8) > 0.5
    live[1] = False
    expected = TORCH.route(x, weight, bias, policy, spec, live, masked_GL=masked)
    given = (None if tensor is None else tensor.to(ran.device) for tensor in (x, weight, bias))
    found = ran.backend.route(*given, policy, spec, live.to(ran.device), masked_GL=masked.to(ran.device))  # type: ignore[misc]
    assert torch.equal(found.plan.expert_ids_TK.cpu(), expected.plan.expert_ids_TK)
    assert torch.equal(found.plan.active_E.cpu(), expected.plan.active_E)
    assert torch.equal(found.load_E.cpu(), expected.load_E)
    assert torch.equal(found.group_experts_G.cpu(), expected.group_experts_G)
    torch.testing.assert_close(found.plan.weights_TK.cpu(), expected.plan.weights_TK, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", [None, *QUANTISATIONS])
def test_moe_ffn(ran: Ran, form: str | None, dtype: torch.dtype) -> None:
    x_TD, plan, bank = scene((9, 4, 8, 64, 64), dtype, unused=0.3)
    given: Bank = bank if form is None else quantise_bank(bank, QUANTISATIONS[form])
    expected = TORCH.moe_ffn(x_TD, plan, given)
    if ran.device.type != "cpu":
        pytest.skip("tests/kernels/triton compares banks on a GPU")
    found = ran.backend.moe_ffn(x_TD, plan, given)
    if form is None:
        assert_near(found, expected)
    else:  # the CPU rounds tokens to 8 bits as well
        assert (found - expected).norm() <= 0.02 * expected.norm()


def test_linear_and_swiglu(ran: Ran, dtype: torch.dtype) -> None:
    x, weight, down = (random(*shape, dtype=dtype) for shape in ((2, 5, 64), (96, 64), (64, 48)))
    on = [tensor.clone().to(ran.device) for tensor in (x, weight, down)]
    assert_near(ran.backend.linear(on[0], on[1]), TORCH.linear(x, weight))
    for _ in range(2):  # what a backend keeps of weights is right the second time too
        assert_near(ran.backend.swiglu(*on), TORCH.swiglu(x, weight, down))
    on[1].mul_(-0.5)
    assert_near(ran.backend.swiglu(*on), TORCH.swiglu(x, -0.5 * weight, down))


def test_norms(ran: Ran, dtype: torch.dtype) -> None:
    x, delta, scale = (random(*shape, dtype=dtype, seed=len(shape)) for shape in ((2, 5, 64), (2, 5, 64), (64,)))
    on = [tensor.to(ran.device) for tensor in (x, delta, scale)]
    assert_near(ran.backend.rms_norm(on[0], on[2], 1e-6), TORCH.rms_norm(x, scale, 1e-6))
    for found, expected in zip(
        ran.backend.add_and_norm(*on, 1e-6), TORCH.add_and_norm(x, delta, scale, 1e-6), strict=True
    ):
        assert_near(found, expected)


class Cached(CacheSlice):
    """As decoding's cache: one start for all rows."""

    def cache_slice(self) -> CacheSlice:
        return self

    def extended_by(self, new: LayerKeyValues) -> LayerKeyValues:
        start, length = self.starts[0], new.keys_BHSD.shape[2]
        self.keys_BHCD[:, :, start : start + length] = new.keys_BHSD
        self.values_BHCD[:, :, start : start + length] = new.values_BHSD
        return LayerKeyValues(*self.reach(length))


@pytest.mark.parametrize("kind", ["nothing", "finished", "cache"])
def test_prepare_heads_and_attention(ran: Ran, kind: str, dtype: torch.dtype) -> None:
    """Behind nothing, behind finished keys and values, and into a cache."""
    heads, kv_heads, size, length = 4, 2, 16, 5

    def computed(backend: Backend, device: torch.device) -> list[Tensor]:
        qkv = random(2, length, heads + 2 * kv_heads, size, dtype=dtype).to(device)
        scales = tuple(random(size, dtype=dtype, seed=seed).to(device) for seed in (1, 2))
        angle = random(2, 1, length, 8, seed=3)
        tables = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
        old = [random(2, kv_heads, 3, size, dtype=dtype, seed=seed).to(device) for seed in (4, 5)]
        past: Past | None = None
        if kind == "finished":
            past = LayerKeyValues(old[0], old[1])
        elif kind == "cache":
            memory = torch.full((2, 2, kv_heads, 12, size), float("nan"), dtype=dtype, device=device)
            memory[0, :, :, :3], memory[1, :, :, :3] = old[0], old[1]
            past = Cached(memory[0], memory[1], [3, 3])
        q, new, seen = backend.prepare_heads(qkv, heads, (scales[0], scales[1]), 1e-6, tables, past)
        mask = torch.rand(2, length, seen.keys_BHSD.shape[2], generator=torch.Generator().manual_seed(6)) < 0.7
        mask[..., 0] = True
        y = backend.attention(q, seen.keys_BHSD, seen.values_BHSD, mask.to(device))
        unmasked = backend.attention(q, seen.keys_BHSD, seen.values_BHSD, None)
        return [q, new.keys_BHSD, new.values_BHSD, seen.keys_BHSD, seen.values_BHSD, y, unmasked]

    expected = computed(TORCH, torch.device("cpu"))
    for found, wanted in zip(computed(ran.backend, ran.device), expected, strict=True):
        assert_near(found, wanted)


@pytest.mark.parametrize("quantised", [False, True])
def test_vocabulary(ran: Ran, quantised: bool, dtype: torch.dtype) -> None:
    hidden, table = random(7, 128, dtype=dtype), random(50, 128, dtype=dtype, seed=1)
    weight: Tensor | QuantisedTable = quantise_table(table.float()) if quantised else table
    if isinstance(weight, QuantisedTable):
        on: Tensor | QuantisedTable = replace(
            weight, codes_PC=weight.codes_PC.to(ran.device), scales_PG=weight.scales_PG.to(ran.device)
        )
    else:
        on = weight.to(ran.device)
    tokens = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(ran.backend.embed(tokens.to(ran.device), on, dtype).cpu(), TORCH.embed(tokens, weight, dtype))
    expected = TORCH.logits(hidden, weight)
    found = ran.backend.logits(hidden.to(ran.device), on)
    assert (found.cpu() - expected).float().norm() <= (0.02 if quantised else 1e-2) * expected.float().norm()
    tokens_R, probability_R = ran.backend.best_token(hidden.to(ran.device), on, [4])
    best_R, sure_R = TORCH.best_token(hidden, weight, [4])
    surely_R = expected.float().topk(2).values.diff().abs().squeeze(1) > 1.0
    assert surely_R.any()
    assert torch.equal(tokens_R.cpu()[surely_R], best_R[surely_R])
    torch.testing.assert_close(probability_R.cpu()[surely_R], sure_R[surely_R], rtol=0.15, atol=0.02)
