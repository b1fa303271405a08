"""Native dense layers: every instruction set of this machine, any number of threads, against float64 and torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.cpu_backend import CpuBackend

from .conftest import ISAS

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.unavailable_reason()}"),
    pytest.mark.usefixtures("unwritten_is_nan"),
]

CPU = CpuBackend()

# Largest error over the largest output: sums of up to a thousand products in float32; one rounding to bfloat16.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
# T, N, D; a depth of more than 512 is summed in segments, tokens beyond two tiles are taken by turns
SHAPES = [(1, 8, 8), (1, 1, 1), (7, 33, 5), (65, 70, 129), (32, 515, 259), (130, 96, 31), (3, 2049, 64)]
SHAPES += [(2, 43, 1091), (5, 43, 1024), (31, 43, 1091), (13, 36, 512)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EXPERTSHARE_ISA", request.param)
    return str(request.param)


def scene(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    num_tokens, num_rows, depth = shape
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, depth, generator=generator).to(dtype)
    return x_TD, torch.randn(num_rows, depth, generator=generator).to(dtype)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_product(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x_TD, weight_ND = scene(shape, dtype)
    outputs = []
    for num_threads in (1, 2, 3):
        native.set_num_threads(num_threads)
        outputs += [CPU.linear(x_TD, weight_ND) for _ in range(3)]
    assert outputs[0].dtype == dtype
    assert error(outputs[0], x_TD.double() @ weight_ND.double().T) < TOLERANCE[dtype]
    assert all(torch.equal(outputs[0], output) for output in outputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("depth", [90, 512, 1091])
def test_a_token_does_not_depend_on_its_batch(isa: str, depth: int, dtype: torch.dtype) -> None:
    x_TD, weight_ND = scene((67, 203, depth), dtype)
    together = CPU.linear(x_TD, weight_ND)
    for first, last in [(0, 1), (5, 7), (66, 67), (3, 40)]:
        assert torch.equal(CPU.linear(x_TD[first:last], weight_ND), together[first:last])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_more_tokens_than_are_taken_at_a_time(dtype: torch.dtype) -> None:
    x_TD, weight_ND = scene((2100, 9, 12), dtype)
    assert error(CPU.linear(x_TD, weight_ND), x_TD.double() @ weight_ND.double().T) < TOLERANCE[dtype]


def test_leading_dimensions_and_views() -> None:
    x_TD, weight_ND = scene((24, 10, 16), torch.float32)
    expected = CPU.linear(x_TD, weight_ND)
    assert torch.equal(CPU.linear(x_TD.view(2, 3, 4, 16), weight_ND), expected.view(2, 3, 4, 10))
    assert torch.equal(CPU.linear(x_TD.T.contiguous().T, weight_ND), expected)
    assert torch.equal(CPU.linear(x_TD[3], weight_ND), expected[3])
    assert CPU.linear(x_TD[:0], weight_ND).shape == (0, 10)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("offset", [1, 3])
def test_weights_need_no_alignment_and_nothing_behind_them_is_used(isa: str, offset: int, dtype: torch.dtype) -> None:
    x_TD, weight_ND = scene((9, 21, 37), dtype)
    memory = torch.full((weight_ND.numel() + 2 * offset,), float("nan"), dtype=dtype)
    moved_ND = memory[offset:-offset].view(weight_ND.shape).copy_(weight_ND)
    assert torch.equal(CPU.linear(x_TD, moved_ND), CPU.linear(x_TD, weight_ND))


def test_nan_and_infinity_stay_with_their_token(isa: str) -> None:
    x_TD, weight_ND = scene((4, 40, 24), torch.bfloat16)
    clean = CPU.linear(x_TD, weight_ND)
    x_TD[1, 5], x_TD[2, 3] = float("nan"), float("inf")
    spoilt = CPU.linear(x_TD, weight_ND)
    assert spoilt[1].isnan().all()
    assert not spoilt[2].isfinite().any()
    assert torch.equal(spoilt[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu_is_the_formula(isa: str, dtype: torch.dtype) -> None:
    x_TD, gate_up_HD = scene((35, 2 * 50, 70), dtype)
    down_DF = scene((1, 70, 50), dtype, seed=1)[1]
    gate, up = (x_TD.double() @ gate_up_HD.double().T).chunk(2, dim=-1)
    expected = (F.silu(gate) * up) @ down_DF.double().T
    got = CPU.swiglu(x_TD.view(5, 7, 70), gate_up_HD, down_DF)
    assert got.shape == (5, 7, 70)
    assert error(got.view(35, 70), expected) < 2 * TOLERANCE[dtype]


Scene = tuple[Tensor, Tensor]
WRONG: dict[str, tuple[str, Callable[[Tensor, Tensor], Scene]]] = {
    "half": ("all in float32 or all in bfloat16", lambda x, w: (x.half(), w.half())),
    "mixed": ("all in float32 or all in bfloat16", lambda x, w: (x.bfloat16(), w)),
    "depth": ("expected x", lambda x, w: (x[:, :-1], w)),
    "one dimension": ("expected x", lambda x, w: (x, w[0])),
    "transposed": ("contiguous once", lambda x, w: (x, w.T.contiguous().T)),
    "gradients": ("no gradients", lambda x, w: (x, w.clone().requires_grad_())),
    "another device": ("on the CPU", lambda x, w: (x.to("meta"), w)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_it_cannot_take_is_said_clearly(what: str) -> None:
    message, spoil = WRONG[what]
    with pytest.raises(ConfigError, match=message):
        CPU.linear(*spoil(*scene((5, 6, 8), torch.float32)))
