"""The native kernel: every instruction set of this machine, any number of threads, against float64 and itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backends import moe_ffn, moe_ffn_loop
from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.native import loading
from expertshare.types import ExpertBank, RoutingPlan

from .test_moe_ffn import formula, plan_of, relative_error, scene

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.unavailable_reason()}")

CPU = CpuBackend()
ISAS = native.usable_instruction_sets() if native.available() else []

# Largest error over the largest output. float32: sums of at most some hundred products in a few partial sums, each
# rounding 6e-8. bfloat16: the result and each hidden feature are rounded once (relative 2^-9 = 2e-3 each, in outputs
# that are sums of hidden features); everything between is float32. Torch rounds five times and is given 2e-2.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}

# tokens, experts per token, experts, model features, expert features
SHAPES = [
    (1, 1, 1, 8, 8),
    (1, 1, 1, 1, 1),
    (2, 2, 5, 3, 5),
    (32, 8, 16, 32, 16),
    (70, 3, 5, 96, 77),
    (64, 8, 12, 259, 131),
    (33, 4, 64, 70, 100),  # groups of one or two tokens
    (5, 2, 3, 512, 256),
    (40, 2, 3, 1091, 600),  # sums in segments, groups of several tiles of tokens
]


@pytest.fixture(autouse=True)
def every_byte_is_accounted_for() -> Iterator[None]:
    """Outputs that nobody wrote are NaN; threads and instruction set are those of the defaults again afterwards."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    native.set_num_threads(None)
    native.use_torch_threads(None)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EXPERTSHARE_ISA", request.param)
    assert native.instruction_set() == request.param
    return str(request.param)


def reference_of(x_TD: Tensor, plan: RoutingPlan, bank: ExpertBank) -> Tensor:
    return moe_ffn_loop(x_TD, plan, bank)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_formula(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x_TD, plan, bank = scene(shape, dtype, unused=0.2, seed=3)
    outputs = []
    for num_threads in (1, 2, 3):
        native.set_num_threads(num_threads)
        outputs += [CPU.moe_ffn(x_TD, plan, bank) for _ in range(3)]
    assert outputs[0].dtype == dtype
    assert outputs[0].shape == x_TD.shape
    assert relative_error(outputs[0], formula(x_TD, plan, bank)) < TOLERANCE[dtype]
    assert all(torch.equal(outputs[0], output) for output in outputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_number_of_tokens(isa: str, dtype: torch.dtype) -> None:
    """All tokens by the same expert: every split of tokens into register tiles, and more than one pass."""
    x_TD, _, bank = scene((140, 1, 1, 40, 36), dtype)
    for num_tokens in [*range(71), 128, 129, 140]:
        plan = plan_of(torch.zeros(num_tokens, 1, dtype=torch.int64), torch.ones(num_tokens, 1), 1)
        y_TD = CPU.moe_ffn(x_TD[:num_tokens], plan, bank)
        assert y_TD.shape == (num_tokens, 40)
        assert num_tokens == 0 or relative_error(y_TD, formula(x_TD[:num_tokens], plan, bank)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_more_tokens_than_are_taken_at_a_time(dtype: torch.dtype) -> None:
    x_TD, plan, bank = scene((2100, 2, 3, 16, 16), dtype, unused=0.1)
    assert relative_error(CPU.moe_ffn(x_TD, plan, bank), formula(x_TD, plan, bank)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("widths", [(50, 44), (1091, 530)])
def test_a_token_does_not_depend_on_its_batch(isa: str, widths: tuple[int, int], dtype: torch.dtype) -> None:
    x_TD, plan, bank = scene((24, 4, 8, *widths), dtype, unused=0.2)
    together = CPU.moe_ffn(x_TD, plan, bank)
    for token in (0, 7, 23):
        alone = plan_of(plan.expert_ids_TK[token : token + 1], plan.weights_TK[token : token + 1], 8)
        assert torch.equal(CPU.moe_ffn(x_TD[token : token + 1], alone, bank)[0], together[token])


@pytest.mark.parametrize("num_threads", [2, 3])
def test_work_of_many_chunks_is_divided_without_a_trace(isa: str, num_threads: int) -> None:
    """Large enough that every thread takes part, with one large group and many small ones."""
    x_TD, plan, bank = scene((40, 2, 24, 256, 160), torch.bfloat16, seed=5)
    ids_TK = plan.expert_ids_TK.clone()
    ids_TK[:, 0] = 7
    ids_TK[ids_TK[:, 1] == 7, 1] = -1
    plan = plan_of(ids_TK, plan.weights_TK, 24)
    native.set_num_threads(1)
    alone = CPU.moe_ffn(x_TD, plan, bank)
    native.set_num_threads(num_threads)
    assert all(torch.equal(CPU.moe_ffn(x_TD, plan, bank), alone) for _ in range(10))
    assert relative_error(alone, formula(x_TD, plan, bank)) < TOLERANCE[torch.bfloat16]


@given(
    st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(4, 9), st.integers(1, 70), st.integers(1, 70)),
    st.floats(0.0, 1.0),
    st.sampled_from(ISAS or ["portable"]),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_equals_the_reference(shape: tuple[int, ...], unused: float, isa: str, num_threads: int, seed: int) -> None:
    x_TD, plan, bank = scene(shape, torch.float32, unused=unused, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERTSHARE_ISA", isa)
        native.set_num_threads(num_threads)
        y_TD = CPU.moe_ffn(x_TD, plan, bank)
    scale = max(1.0, float(y_TD.abs().max())) if y_TD.numel() else 1.0
    torch.testing.assert_close(y_TD, reference_of(x_TD, plan, bank), rtol=0, atol=3e-6 * scale)


@given(st.integers(0, 1000), st.integers(1, 6))
def test_an_expert_may_serve_several_slots_of_a_token(seed: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TD, _, bank = scene((7, 1, 3, 20, 12), torch.float32, seed=seed)
    ids_TK = torch.randint(-1, 3, (7, top_k), generator=generator)
    plan = plan_of(ids_TK, torch.rand(7, top_k, generator=generator), 3)
    assert relative_error(CPU.moe_ffn(x_TD, plan, bank), formula(x_TD, plan, bank)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bfloat16_is_no_worse_than_torch(isa: str, dtype: torch.dtype) -> None:
    x_TD, plan, bank = scene((32, 8, 16, 256, 128), dtype)
    exact = formula(x_TD, plan, bank)
    torch_error = relative_error(moe_ffn(x_TD, plan, bank), exact)
    # In float32 both are at the level of single roundings, where the order of sums decides.
    assert relative_error(CPU.moe_ffn(x_TD, plan, bank), exact) <= torch_error * (2 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_at_its_extremes(isa: str, dtype: torch.dtype) -> None:
    """One feature in, so that the gate is exact: saturated, tiny and zero gates."""
    gates = torch.tensor([-1e4, -200.0, -88.0, -20.0, -1.0, -1e-20, 0.0, 1e-20, 0.5, 20.0, 88.0, 200.0, 1e4]).to(dtype)
    x_TD = gates[:, None]
    bank = ExpertBank(torch.ones(1, 2, 1, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype))
    plan = plan_of(torch.zeros(len(gates), 1, dtype=torch.int64), torch.ones(len(gates), 1), 1)
    expected = torch.nn.functional.silu(gates.double()) * gates.double()
    rtol = 1e-6 if dtype == torch.float32 else 2**-8  # h and y are rounded: to the same value, or to neighbours
    torch.testing.assert_close(CPU.moe_ffn(x_TD, plan, bank)[:, 0].double(), expected, rtol=rtol, atol=1e-29)


def test_nan_and_infinity_come_through(isa: str) -> None:
    x_TD, plan, bank = scene((4, 2, 3, 40, 24), torch.bfloat16)
    clean = CPU.moe_ffn(x_TD, plan, bank)
    x_TD[1, 5], x_TD[2, 39] = float("nan"), float("inf")
    y_TD = CPU.moe_ffn(x_TD, plan, bank)
    assert not y_TD[1].isfinite().any()
    assert not y_TD[2].isfinite().all()
    assert torch.equal(y_TD[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_other_experts_and_other_rows_are_never_used(isa: str, dtype: torch.dtype) -> None:
    """Inactive experts are NaN, as are the ends of rows before and behind: a vector too many would show."""
    x_TD, plan, bank = scene((5, 2, 16, 37, 19), dtype, unused=0.3)
    clean = CPU.moe_ffn(x_TD, plan, bank)
    gate_up, down = bank.gate_up_EHD.clone(), bank.down_EDF.clone()
    gate_up[~plan.active_E], down[~plan.active_E] = float("nan"), float("nan")
    assert torch.equal(CPU.moe_ffn(x_TD, plan, ExpertBank(gate_up, down)), clean)


def at_offset(tensor: Tensor, offset_bytes: int) -> Tensor:
    """The same values, starting `offset_bytes` behind a boundary of 64 bytes."""
    skip = offset_bytes // tensor.element_size()
    base = torch.empty(tensor.numel() + skip, dtype=tensor.dtype)
    assert base.data_ptr() % 64 == 0
    moved = base[skip:].view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("offset_bytes", [4, 8, 40])
def test_weights_need_no_alignment(isa: str, offset_bytes: int, dtype: torch.dtype) -> None:
    """Tensors of a memory-mapped safetensors file are aligned to 8 bytes."""
    x_TD, plan, bank = scene((9, 2, 4, 64, 48), dtype)
    moved = ExpertBank(at_offset(bank.gate_up_EHD, offset_bytes), at_offset(bank.down_EDF, offset_bytes))
    assert torch.equal(CPU.moe_ffn(at_offset(x_TD, 8), plan, moved), CPU.moe_ffn(x_TD, plan, bank))


def test_experts_may_lie_apart_and_tokens_anyhow() -> None:
    """Every second expert of a larger bank, tokens and plan as transposed views."""
    x_TD, plan, bank = scene((9, 3, 8, 24, 16), torch.float32)
    plan = plan_of(plan.expert_ids_TK.remainder(4), plan.weights_TK, 4)
    halves = ExpertBank(bank.gate_up_EHD[::2], bank.down_EDF[::2])
    expected = CPU.moe_ffn(x_TD, plan, ExpertBank(*(t.contiguous() for t in (halves.gate_up_EHD, halves.down_EDF))))
    views = replace(plan, expert_ids_TK=plan.expert_ids_TK.T.contiguous().T, weights_TK=plan.weights_TK.T.clone().T)
    assert torch.equal(CPU.moe_ffn(x_TD.T.contiguous().T, views, halves), expected)


def test_concurrent_calls_do_not_mix() -> None:
    native.set_num_threads(2)
    scenes = [scene((20 + 9 * seed, 2, 6, 128, 96), torch.float32, seed=seed) for seed in range(2)]
    expected = [CPU.moe_ffn(*one) for one in scenes]
    wrong: list[int] = []

    def repeat(which: int) -> None:
        wrong.extend(which for _ in range(60) if not torch.equal(CPU.moe_ffn(*scenes[which]), expected[which]))

    threads = [threading.Thread(target=repeat, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_gets_its_own_threads() -> None:
    native.set_num_threads(3)
    x_TD, plan, bank = scene((40, 2, 8, 128, 96), torch.float32)
    expected = CPU.moe_ffn(x_TD, plan, bank)
    child = os.fork()
    if child == 0:  # nothing here may return to pytest
        signal.alarm(30)
        same = all(torch.equal(CPU.moe_ffn(x_TD, plan, bank), expected) for _ in range(5))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(CPU.moe_ffn(x_TD, plan, bank), expected)


@pytest.fixture
def three_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is found through /proc")
@pytest.mark.usefixtures("three_torch_threads")
def test_torch_threads_compute_the_same() -> None:
    """By turns with torch's own operations, and in a forked child, where torch's threads no longer exist."""
    x_TD, plan, bank = scene((40, 2, 8, 128, 96), torch.float32)
    native.use_torch_threads(False)
    expected = CPU.moe_ffn(x_TD, plan, bank)
    native.use_torch_threads(True)
    square = torch.ones(300, 300)
    for _ in range(5):
        assert torch.equal(square @ square, torch.full((300, 300), 300.0))
        assert torch.equal(CPU.moe_ffn(x_TD, plan, bank), expected)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if bytes(CPU.moe_ffn(x_TD, plan, bank).numpy().data) == bytes(expected.numpy().data) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_ends_with_its_threads() -> None:
    script = (
        "import torch; from expertshare import native; from expertshare.kernels.cpu_backend import CpuBackend;"
        "from expertshare.types import *;"
        "native.set_num_threads(3); ids = torch.arange(64).view(64, 1) % 8;"
        "plan = RoutingPlan(ids, torch.ones(64, 1), torch.ones(8, dtype=torch.bool));"
        "bank = ExpertBank(torch.ones(8, 128, 128), torch.ones(8, 128, 64));"
        "print(CpuBackend().moe_ffn(torch.ones(64, 128), plan, bank).shape)"
    )
    package = Path(native.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([64, 128])\n", "")


Scene = tuple[Tensor, RoutingPlan, ExpertBank]
WRONG: dict[str, tuple[str, Callable[[Scene], Scene]]] = {
    "too large an expert id": ("-1 .unused. or 0 to 3", lambda s: (s[0], with_id(s[1], 4), s[2])),
    "too small an expert id": ("-1 .unused. or 0 to 3", lambda s: (s[0], with_id(s[1], -2), s[2])),
    "half": ("float32 or all in bfloat16", lambda s: (s[0].half(), s[1], s[2])),
    "mixed dtypes": ("float32 or all in bfloat16", lambda s: (s[0].bfloat16(), s[1], s[2])),
    "int32 ids": (
        "expert ids in torch.int64",
        lambda s: (s[0], replace(s[1], expert_ids_TK=s[1].expert_ids_TK.int()), s[2]),
    ),
    "other hidden size": (r"expected tokens \[\.\.\., D\].* D = 16", lambda s: (s[0][:, :-1].contiguous(), s[1], s[2])),
    "too few plan rows": (r"expected tokens \[\.\.\., D\], expert ids \[T, K\]", lambda s: (s[0][:-1], s[1], s[2])),
    "gate alone": ("do not fit down", lambda s: (s[0], s[1], ExpertBank(s[2].gate_up_EHD[:, :8], s[2].down_EDF))),
    "two dimensions": (
        r"expected weights \[E, rows, depth\]",
        lambda s: (s[0], s[1], ExpertBank(s[2].gate_up_EHD, s[2].down_EDF[0])),
    ),
    "transposed rows": ("contiguous once", lambda s: (s[0], s[1], ExpertBank(s[2].gate_up_EHD, turned(s[2].down_EDF)))),
    "another device": ("on the CPU, got cpu, meta", lambda s: (s[0].to("meta"), s[1], s[2])),
    "gradients": ("has no gradients", lambda s: (s[0].clone().requires_grad_(), s[1], s[2])),
}


def turned(weights: Tensor) -> Tensor:
    """The same values with the last two dimensions swapped in memory."""
    return weights.transpose(1, 2).contiguous().transpose(1, 2)


def with_id(plan: RoutingPlan, expert: int) -> RoutingPlan:
    ids_TK = plan.expert_ids_TK.clone()
    ids_TK[-1, -1] = expert
    return replace(plan, expert_ids_TK=ids_TK)


@pytest.mark.parametrize("what", WRONG)
def test_what_it_cannot_take_is_said_clearly(what: str) -> None:
    message, spoil = WRONG[what]
    right = scene((6, 2, 4, 16, 8), torch.float32)
    with pytest.raises(ConfigError, match=message):
        CPU.moe_ffn(*spoil(right))
    assert relative_error(CPU.moe_ffn(*right), formula(*right)) < TOLERANCE[torch.float32]


def test_gradients_are_not_asked_for_in_inference() -> None:
    x_TD, plan, bank = scene((6, 2, 4, 16, 8), torch.float32)
    with torch.no_grad():
        assert CPU.moe_ffn(x_TD.requires_grad_(), plan, bank).grad_fn is None


def test_instruction_sets_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERTSHARE_ISA", raising=False)
    assert native.instruction_set() == ISAS[0]
    assert ISAS[-1] == "portable"
    monkeypatch.setenv("EXPERTSHARE_ISA", "avx3")
    with pytest.raises(ConfigError, match="Did you mean 'avx2'"):
        native.instruction_set()


def test_an_instruction_set_that_cannot_run_here_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "usable_instruction_sets", lambda: ["portable"])
    loading._usable_isa.cache_clear()
    monkeypatch.setenv("EXPERTSHARE_ISA", "avx512_bf16")
    with pytest.raises(ConfigError, match=r"cannot run here.*Expected one of portable"):
        native.instruction_set()
    monkeypatch.delenv("EXPERTSHARE_ISA")
    assert native.instruction_set() == "portable"
    loading._usable_isa.cache_clear()


@pytest.mark.parametrize("num_threads", [0, -1, 5000])
def test_impossible_numbers_of_threads(num_threads: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 1024 threads"):
        native.set_num_threads(num_threads)
