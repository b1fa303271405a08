"""The head with int8 weights: against its arithmetic written out in float64, and against widened weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backends import backend_named
from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.kernels.quantise import quantise_table, table_rows
from expertshare.types import QuantisedTable

from .conftest import ISAS

needs_native = pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.unavailable_reason()}")
CPU = CpuBackend()
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(1, 5, 16), (1, 2, 48), (7, 33, 80), (65, 700, 144), (32, 1111, 256), (13, 64, 32), (2, 257, 384)]  # R, V, D


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EXPERTSHARE_ISA", request.param)
    return str(request.param)


def scene(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, QuantisedTable, Tensor]:
    """Hidden states, codes, and what the codes stand for, float64 [V, D], by the definition of a symmetric row."""
    num_rows, vocabulary, depth = shape
    generator = torch.Generator().manual_seed(sum(shape))
    hidden_RD = torch.randn(num_rows, depth, generator=generator).to(dtype)
    weight_VD = torch.randn(vocabulary, depth, generator=generator) * 3 / depth**0.5
    weight = quantise_table(weight_VD)
    row, feature = torch.arange(vocabulary).view(-1, 1), torch.arange(depth).view(1, -1)
    codes_VD = weight.codes_PC[row // 16, feature // 4 * 64 + row % 16 * 4 + feature % 4]
    return hidden_RD, weight, codes_VD.double() * weight.scales_PG[row // 16, row % 16].double()


def rounded_to_spans(hidden_RD: Tensor) -> Tensor:
    """Of every 128 features the largest becomes 127: float64."""
    padded = F.pad(hidden_RD.float(), (0, -hidden_RD.shape[1] % 128)).unflatten(-1, (-1, 128))
    largest = padded.abs().amax(dim=-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # not 127 / largest, which torch computes as 127 * (1 / largest)
    codes = (padded * inverse.where(largest > 0, 0.0)).round()
    return (codes.double() * (largest / 127).double()).flatten(1)[:, : hidden_RD.shape[1]]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_arithmetic_written_out(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden_RD, weight, widened_VD = scene(shape, dtype)
    expected_RV = rounded_to_spans(hidden_RD) @ widened_VD.T
    found_RV = CPU.logits(hidden_RD, weight)
    assert found_RV.dtype == dtype
    step = 2**-8 if dtype == torch.bfloat16 else 2**-20
    torch.testing.assert_close(found_RV.double(), expected_RV, rtol=step, atol=2e-6)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_token_is_that_of_the_logits(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden_RD, weight, _ = scene(shape, dtype)
    excluded = shape[1] // 2
    logits_RV = CPU.logits(hidden_RD, weight).double().index_fill(1, torch.tensor([excluded]), -torch.inf)
    outputs = []
    for num_threads in (1, 2, 3):
        native.set_num_threads(num_threads)
        outputs += [CPU.best_token(hidden_RD, weight, [excluded]) for _ in range(3)]
    tokens_R, probability_R = outputs[0]
    assert torch.equal(tokens_R, logits_RV.argmax(dim=1))
    torch.testing.assert_close(probability_R.double(), logits_RV.softmax(dim=1).amax(dim=1), rtol=1e-3, atol=0)
    for tokens, probability in outputs:
        assert torch.equal(tokens, tokens_R)
        assert torch.equal(probability, probability_R)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_RD, weight, _ = scene((21, 333, 400), dtype)
    found = []
    for name in ISAS:
        monkeypatch.setenv("EXPERTSHARE_ISA", name)
        found.append(CPU.logits(hidden_RD, weight))
    for other in found[1:]:
        assert torch.equal(other, found[0])


@needs_native
def test_a_row_does_not_depend_on_its_batch(isa: str) -> None:
    hidden_RD, weight, _ = scene((70, 530, 160), torch.bfloat16)
    whole = CPU.logits(hidden_RD, weight)
    together = CPU.best_token(hidden_RD, weight, [7])
    for first, last in [(0, 1), (5, 7), (69, 70), (3, 40)]:
        alone = CPU.best_token(hidden_RD[first:last], weight, [7])
        assert torch.equal(CPU.logits(hidden_RD[first:last], weight), whole[first:last])
        assert torch.equal(alone[0], together[0][first:last])
        assert torch.equal(alone[1], together[1][first:last])


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told(isa: str, value: float) -> None:
    hidden_RD, weight, _ = scene((3, 300, 256), torch.float32)
    hidden_RD[1, 130] = value
    _, probability_R = CPU.best_token(hidden_RD, weight, [])
    assert probability_R.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", ["torch", *(["cpu"] if native.available() else [])])
def test_backends_are_near_the_weights_that_were_rounded(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_RD = torch.randn(40, 256, generator=generator)
    weight_VD = torch.randn(6000, 256, generator=generator) / 16
    weight = quantise_table(weight_VD)
    found_RV, exact_RV = backend_named(backend).logits(hidden_RD, weight), hidden_RD @ weight_VD.T
    assert (found_RV - exact_RV).norm() < 0.015 * exact_RV.norm()
    tokens_R, probability_R = backend_named(backend).best_token(hidden_RD, weight, [])
    assert torch.equal(tokens_R, found_RV.argmax(dim=1))
    torch.testing.assert_close(probability_R, found_RV.softmax(dim=1).amax(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_are_the_rows_asked_for(dtype: torch.dtype) -> None:
    _, weight, widened_VD = scene((1, 50, 32), dtype)
    tokens_BS = torch.tensor([[3, 49, 3], [0, 7, 20]])
    found = table_rows(weight, tokens_BS, dtype)
    assert found.shape == (2, 3, 32)
    assert torch.equal(found, widened_VD[tokens_BS].float().to(dtype))


@needs_native
def test_what_the_kernel_cannot_take_is_refused() -> None:
    hidden_RD, weight, _ = scene((2, 40, 64), torch.float32)
    cases = [
        (hidden_RD, replace(weight, codes_PC=weight.codes_PC.view(torch.uint8)), "codes of weights in torch.int8"),
        (hidden_RD.double(), weight, "float32 or bfloat16"),
        (hidden_RD[:, :63], weight, r"C = 16 \* D"),
        (hidden_RD, replace(weight, scales_PG=weight.scales_PG[1:]), "P panels of 16 rows for N rows.* N = 40"),
        (hidden_RD, replace(weight, num_rows=49), "P panels of 16 rows for N rows.* N = 49"),
        (hidden_RD, replace(weight, scales_PG=weight.scales_PG.bfloat16()), "scales"),
        (hidden_RD, replace(weight, codes_PC=weight.codes_PC.T.contiguous().T), "contiguous"),
        (hidden_RD.clone().requires_grad_(), weight, "no gradients"),
    ]
    for features, given, reason in cases:
        with pytest.raises(ConfigError, match=reason):
            CPU.best_token(features, given, [])
    with pytest.raises(ConfigError, match=r"must lie in 0\.\.39"):
        CPU.best_token(hidden_RD, weight, [40])
