"""Expert computation: every backend against the formula written out in float64, and against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backends import moe_ffn, moe_ffn_loop
from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels import BACKENDS, choose_backend, torch_backend
from expertshare.kernels.quantise import only_used
from expertshare.types import ExpertBank, RoutingPlan

CPU = torch.device("cpu")
RUNNABLE = [
    pytest.param(name, marks=pytest.mark.skipif(name == "cpu" and not native.available(), reason="library not built"))
    for name in BACKENDS
    if name != "triton"  # tests/kernels/triton: other dtypes, and not everywhere
]

# tokens, experts per token, experts, model features, expert features
SHAPES = [
    (1, 1, 1, 8, 8),
    (3, 2, 4, 16, 8),
    (32, 8, 16, 32, 16),
    (17, 4, 64, 24, 40),  # far more experts than pairs: most are empty
    (40, 8, 8, 16, 24),  # every expert by every token
]
# Largest error, relative to the largest output: rounding of each factor, of the sum over F and of the result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """An output or gradient row that nobody wrote must fail here, not now and then in training."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def scene(
    shape: tuple[int, ...], dtype: torch.dtype, *, unused: float = 0.0, seed: int = 0
) -> tuple[Tensor, RoutingPlan, ExpertBank]:
    """Random tokens, weights and a plan of distinct experts per token; a share `unused` of the slots is -1."""
    num_tokens, top_k, num_experts, hidden, inner = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x_TD = normal(num_tokens, hidden).to(dtype)
    gate_up, down = 0.3 * normal(num_experts, 2 * inner, hidden), 0.3 * normal(num_experts, hidden, inner)
    bank = ExpertBank(gate_up.to(dtype), down.to(dtype))
    ids_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=-1)[:, :top_k]
    weights_TK = torch.rand(num_tokens, top_k, generator=generator)
    dropped_TK = torch.rand(num_tokens, top_k, generator=generator) < unused
    return x_TD, plan_of(ids_TK.masked_fill(dropped_TK, -1), weights_TK, num_experts), bank


def plan_of(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> RoutingPlan:
    active_E = torch.tensor([bool((ids_TK == expert).any()) for expert in range(num_experts)], dtype=torch.bool)
    return RoutingPlan(ids_TK, weights_TK.masked_fill(ids_TK < 0, 0.0), active_E)


def formula(x_TD: Tensor, plan: RoutingPlan, bank: ExpertBank) -> Tensor:
    """Every expert on every token in float64, then the mix as one sum: no sorting, no slots, no chunks."""
    num_experts, double_inner, _ = bank.gate_up_EHD.shape
    mixing_TE = torch.zeros(len(x_TD), num_experts + 1, dtype=torch.float64)
    mixing_TE.scatter_add_(1, plan.expert_ids_TK + 1, plan.weights_TK.double())
    x, inner = x_TD.double(), double_inner // 2
    gate = torch.einsum("td,efd->tef", x, bank.gate_up_EHD[:, :inner].double())
    up = torch.einsum("td,efd->tef", x, bank.gate_up_EHD[:, inner:].double())
    hidden = gate * torch.sigmoid(gate) * up
    return torch.einsum("te,edf,tef->td", mixing_TE[:, 1:], bank.down_EDF.double(), hidden)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-6)
    return float(((actual.double() - expected).abs() / scale).max())


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("unused", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_follow_the_formula(shape: tuple[int, ...], unused: float, dtype: torch.dtype, backend: str) -> None:
    x_TD, plan, bank = scene(shape, dtype, unused=unused)
    actual = moe_ffn(x_TD, plan, bank, backend=backend)
    assert actual.dtype == dtype
    assert actual.shape == x_TD.shape
    assert relative_error(actual, formula(x_TD, plan, bank)) < TOLERANCE[dtype]


@given(
    st.tuples(
        st.integers(0, 9), st.integers(1, 4), st.integers(4, 9), st.sampled_from([8, 16]), st.sampled_from([8, 24])
    ),
    st.floats(0.0, 1.0),
    st.integers(0, 1000),
)
def test_one_grouped_product_is_the_plain_loop(shape: tuple[int, ...], unused: float, seed: int) -> None:
    x_TD, plan, bank = scene(shape, torch.float32, unused=unused, seed=seed)
    torch.testing.assert_close(moe_ffn(x_TD, plan, bank), moe_ffn_loop(x_TD, plan, bank), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_inactive_experts_never_leak(dtype: torch.dtype, backend: str) -> None:
    """A store may leave the memory of experts that the plan does not name uninitialised."""
    x_TD, plan, bank = scene((5, 2, 16, 16, 8), dtype, unused=0.3)
    clean = moe_ffn(x_TD, plan, bank, backend=backend)
    gate_up, down = bank.gate_up_EHD.clone(), bank.down_EDF.clone()
    assert not plan.active_E.all()
    gate_up[~plan.active_E], down[~plan.active_E] = float("nan"), float("nan")
    assert torch.equal(moe_ffn(x_TD, plan, ExpertBank(gate_up, down), backend=backend), clean)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_rows_of_unused_slots_never_leak(backend: str) -> None:
    """A padding token runs nothing: its features, however wild, stay out of everything, and its output is 0."""
    x_TD, plan, bank = scene((6, 2, 4, 16, 8), torch.float32)
    ids_TK = plan.expert_ids_TK.clone()
    ids_TK[4:] = -1
    plan = plan_of(ids_TK, plan.weights_TK, 4)
    clean = moe_ffn(x_TD, plan, bank, backend=backend)
    x_TD[4:] = float("nan")
    poisoned = moe_ffn(x_TD, plan, bank, backend=backend)
    assert torch.equal(poisoned[:4], clean[:4])
    assert poisoned[4:].eq(0).all()


@pytest.mark.parametrize("backend", RUNNABLE)
def test_no_tokens_and_no_experts_run(backend: str) -> None:
    x_TD, plan, bank = scene((0, 2, 4, 16, 8), torch.float32)
    assert moe_ffn(x_TD, plan, bank, backend=backend).shape == (0, 16)
    x_TD, plan, bank = scene((3, 2, 4, 16, 8), torch.float32, unused=1.1)
    assert moe_ffn(x_TD, plan, bank, backend=backend).eq(0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    x_TD, plan, bank = scene((24, 4, 8, 16, 8), dtype, unused=0.2)
    together = moe_ffn(x_TD, plan, bank)
    order = torch.arange(23, -1, -1)
    turned = moe_ffn(x_TD[order], plan_of(plan.expert_ids_TK[order], plan.weights_TK[order], 8), bank)
    torch.testing.assert_close(turned[order], together, rtol=1e-6, atol=1e-6)


GRADIENT_SHAPE = (12, 3, 6, 16, 8)


def gradients(
    compute: Callable[[Tensor, RoutingPlan, ExpertBank], Tensor],
    unused: float,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = GRADIENT_SHAPE,
) -> list[Tensor]:
    x_TD, plan, bank = scene(shape, dtype, unused=unused)
    leaves = [t.clone().requires_grad_() for t in (x_TD, plan.weights_TK, bank.gate_up_EHD, bank.down_EDF)]
    x_TD, weights_TK, gate_up, down = leaves
    used = RoutingPlan(plan.expert_ids_TK, weights_TK, plan.active_E)
    y_TD = compute(x_TD, used, ExpertBank(gate_up, down))
    target = torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)
    (y_TD.float() * target).sum().backward()
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None for grad in grads)
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("shape", [GRADIENT_SHAPE, (5, 2, 16, 16, 8)])  # in the second most experts run nothing
@pytest.mark.parametrize("unused", [0.0, 0.4])
def test_gradients_equal_those_of_the_plain_loop(unused: float, shape: tuple[int, ...]) -> None:
    for found, expected in zip(*(gradients(f, unused, shape=shape) for f in (moe_ffn, moe_ffn_loop)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_in_bfloat16_are_close() -> None:
    exact = gradients(moe_ffn_loop, 0.3)
    for rough, fine in zip(gradients(moe_ffn, 0.3, torch.bfloat16), exact, strict=True):
        assert relative_error(rough.float(), fine.double()) < 0.05


def test_an_unused_slot_has_no_gradient() -> None:
    x_grad, weights_grad, gate_up_grad, down_grad = gradients(moe_ffn, 0.4)
    _, plan, _ = scene(GRADIENT_SHAPE, torch.float32, unused=0.4)
    assert weights_grad[plan.expert_ids_TK < 0].eq(0).all()
    assert weights_grad[plan.expert_ids_TK >= 0].ne(0).all()
    assert all(grad.isfinite().all() for grad in (x_grad, gate_up_grad, down_grad))


def test_a_bank_with_too_many_rows_for_a_grouped_product_is_cut_to_the_plan() -> None:
    """On a GPU torch refuses 1,024 groups and more (MOST_GROUPS)."""
    x_TD, plan, bank = scene((3, 2, 9, 16, 8), torch.float32, unused=0.3)
    small, experts = only_used(plan)
    chosen = ExpertBank(bank.gate_up_EHD[experts], bank.down_EDF[experts])
    assert torch.equal(experts, plan.active_E.nonzero().flatten())
    assert len(experts) < 9
    assert small.active_E.tolist() == [True] * len(experts)
    used_TK = plan.expert_ids_TK >= 0
    assert torch.equal(experts[small.expert_ids_TK[used_TK]], plan.expert_ids_TK[used_TK])
    assert small.expert_ids_TK[~used_TK].eq(-1).all()
    assert torch.equal(moe_ffn(x_TD, small, chosen), moe_ffn(x_TD, plan, bank))


def test_only_a_bank_that_is_too_large_and_not_on_the_host_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(Exception):
        """What the stand-in for `only_used` raises."""

    def cut(plan: RoutingPlan) -> None:
        raise Cut

    x_TD, plan, bank = scene((3, 2, 9, 16, 8), torch.float32)
    elsewhere = ExpertBank(bank.gate_up_EHD.to("meta"), bank.down_EDF.to("meta"))
    monkeypatch.setattr(torch_backend, "only_used", cut)
    monkeypatch.setattr(torch_backend, "MOST_GROUPS", 9)
    assert moe_ffn(x_TD, plan, bank).isfinite().all()  # no limit on the host
    with pytest.raises(Cut):
        moe_ffn(x_TD, plan, elsewhere)


def test_an_unknown_backend_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown expert backend 'tritn'. Did you mean 'triton'"):
        choose_backend("tritn", CPU)


def test_auto_means_the_native_kernel_on_a_cpu_and_torch_elsewhere() -> None:
    assert choose_backend("auto", CPU).name == ("cpu" if native.available() else "torch")
    assert choose_backend("auto", torch.device("cuda")).name == "torch"
    assert choose_backend("torch", CPU).name == "torch"
    for gone in ("grouped", "reference"):
        with pytest.raises(ConfigError, match=rf"unknown expert backend '{gone}'.*torch"):
            choose_backend(gone, CPU)
